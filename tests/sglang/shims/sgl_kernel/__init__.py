"""Stands in for SGLang's compiled kernels, of which there is no build for CPUs to install.

SGLang imports names from here that serving a text model on a CPU never calls. Whatever is called
after all says so.
"""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*arguments, **options):
        raise NotImplementedError(f"sgl_kernel.{name} was called, which only a GPU has")

    return kernel
