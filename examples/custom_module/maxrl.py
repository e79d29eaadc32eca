from lightning_grpo import GRPOModule, group_mean


class MaxRL(GRPOModule):
    def advantages(self, rewards, group_ids):
        mean = group_mean(rewards, group_ids)
        return (rewards - mean) / mean.clamp_min(1e-6)
