import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_grpo.policy.packed import chunk_rows, head_logprobs

ROWS, HIDDEN, VOCAB = 13, 6, 17


def head_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    temperature = 0.5 + torch.rand(ROWS, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, temperature


def reference(hidden, weight, targets, temperature):
    logits = hidden.double() @ weight.double().t() / temperature.double().unsqueeze(1)
    log_softmax = logits.log_softmax(-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_softmax.gather(1, targets.unsqueeze(1)).squeeze(1), entropy


@pytest.mark.parametrize("rows", [1, 4, 12, 13, 100])
def test_values_and_gradients_equal_those_of_all_logits_at_once(rows):
    hidden, weight, targets, temperature = head_inputs()
    expected = reference(hidden, weight, targets, temperature)
    found = head_logprobs(hidden, weight, targets, temperature, True, rows * VOCAB)
    probe = torch.randn(2, ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for logprobs, entropy in (expected, found):
        loss = (probe[0] * logprobs + probe[1] * entropy).sum()
        gradients.append(torch.autograd.grad(loss, (hidden, weight)))
    for left, right in zip((*expected, *gradients[0]), (*found, *gradients[1]), strict=True):
        assert torch.allclose(left, right, atol=1e-12)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("max_logits", [3 * VOCAB, 1000])
def test_the_gradient_is_that_of_finite_differences(with_entropy, max_logits):
    hidden, weight, targets, temperature = head_inputs()

    def function(hidden, weight):
        logprobs, entropy = head_logprobs(
            hidden, weight, targets, temperature.double(), with_entropy, max_logits
        )
        return (logprobs, entropy) if with_entropy else logprobs

    assert torch.autograd.gradcheck(function, (hidden, weight))


class LargestVocabTensor(TorchDispatchMode):
    """Remembers the most elements that any tensor with a vocabulary axis had."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == VOCAB:
                self.rows = max(self.rows, tensor.numel() // VOCAB)
        return out


@pytest.mark.parametrize("with_entropy", [False, True])
def test_no_more_than_one_chunk_of_logits_exists_forward_or_backward(with_entropy):
    hidden, weight, targets, temperature = head_inputs()
    # The weight's own gradient is [vocab, hidden]; its transpose would be mistaken for logits.
    with LargestVocabTensor() as spy:
        logprobs, entropy = head_logprobs(
            hidden, weight.detach(), targets, temperature, with_entropy, 4 * VOCAB
        )
        (logprobs.sum() + (entropy.sum() if with_entropy else 0.0)).backward()
    assert 0 < spy.rows <= max(4, HIDDEN)
    with LargestVocabTensor() as spy:
        head_logprobs(hidden, weight.detach(), targets, temperature, with_entropy, 1000)
    assert spy.rows == ROWS


def test_logits_are_fp32_where_hidden_states_and_weights_are_bf16():
    hidden, weight, targets, temperature = head_inputs(torch.bfloat16)
    logprobs, entropy = head_logprobs(hidden, weight, targets, temperature, True)
    expected, expected_entropy = reference(hidden, weight, targets, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    # Products and sums of bf16 numbers in fp32 are right to 1e-5; in bf16 they are not to 1e-2.
    assert torch.allclose(logprobs.double(), expected, atol=1e-5)
    assert torch.allclose(entropy.double(), expected_entropy, atol=1e-5)
    logprobs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_no_rows_at_all_give_gradients_of_zero():
    hidden, weight, targets, temperature = head_inputs()
    nothing = torch.zeros(0, dtype=torch.int64)
    logprobs, _ = head_logprobs(
        hidden[nothing], weight, targets[nothing], temperature[nothing], False
    )
    logprobs.sum().backward()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_a_chunk_is_at_least_one_row():
    assert chunk_rows(1000, 10) == 1
    assert chunk_rows(1000, 5500) == 5


@pytest.mark.parametrize("rows", [4, 100])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_rounds_what_comes_in_and_no_logits(rows, inside):
    _, weight, targets, temperature = head_inputs(torch.float32)
    hidden = head_inputs(torch.bfloat16)[0]
    rounded = (hidden.detach().requires_grad_(), weight.detach().bfloat16().requires_grad_())
    expected = head_logprobs(*rounded, targets, temperature, True, rows * VOCAB)
    sum(t.sum() for t in expected).backward()
    with torch.autocast("cpu", torch.bfloat16):
        found = head_logprobs(hidden, weight, targets, temperature, True, rows * VOCAB)
        if inside:  # where a step has several micro-batches, the first ones' backward is
            sum(t.sum() for t in found).backward()
    if not inside:
        sum(t.sum() for t in found).backward()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert torch.equal(hidden.grad, rounded[0].grad)
    assert torch.equal(weight.grad, rounded[1].grad.float())
