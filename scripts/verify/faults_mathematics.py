"""Faults of the mathematics: advantages and losses, the bonus, the members and their disagreement."""

from __future__ import annotations

from fault_rows import in_files

GRPO = in_files(
    "tests/grpo",
    (
        "groups divided by the population's deviation",
        "grpo/advantages.py",
        "(squares / (count - 1).clamp_min(1)).sqrt()",
        "(squares / count.clamp_min(1)).sqrt()",
    ),
    ("step divided by the population's deviation", "grpo/advantages.py", "/ (self.count - 1)", "/ self.count"),
    ("a smaller floor under deviations", "grpo/advantages.py", "STD_FLOOR = 1e-4", "STD_FLOOR = 1e-6"),
    (
        "one None silences a completion",
        "grpo/advantages.py",
        "masked_fill(rewards.isnan().all(dim=1), torch.nan)",
        "masked_fill(rewards.isnan().any(dim=1), torch.nan)",
    ),
    ("no group is stalled", "grpo/advantages.py", "return highest <= lowest", "return highest < lowest"),
    (
        "the overlong penalty starts late",
        "grpo/advantages.py",
        "max_new_tokens - cache - lengths.float()",
        "max_new_tokens - lengths.float()",
    ),
    (
        "clip ranges swapped",
        "grpo/losses.py",
        "low, high = 1.0 - settings.epsilon_low, 1.0 + settings.epsilon_high",
        "low, high = 1.0 - settings.epsilon_high, 1.0 + settings.epsilon_low",
    ),
    (
        "k3 of the inverse ratio",
        "grpo/losses.py",
        "torch.expm1(-log_ratio) + log_ratio",
        "torch.expm1(log_ratio) - log_ratio",
    ),
    (
        "entropy is punished",
        "grpo/losses.py",
        "loss = loss - settings.entropy_weight *",
        "loss = loss + settings.entropy_weight *",
    ),
    (
        "dr_grpo divides by tokens",
        "grpo/losses.py",
        '"dr_grpo": Variant(clipped_surrogate, constant_length)',
        '"dr_grpo": Variant(clipped_surrogate, token_mean)',
    ),
    (
        "the importance cap is a floor",
        "grpo/losses.py",
        "torch.exp(difference).clamp(max=cap)",
        "torch.exp(difference).clamp(min=cap)",
    ),
    (
        "SAPO's temperatures swapped",
        "grpo/losses.py",
        "torch.where(terms.advantages > 0, positive",
        "torch.where(terms.advantages <= 0, positive",
    ),
    (
        "leave_one_out counts the completion itself",
        "grpo/estimators.py",
        "/ (count - 1).clamp_min(1)",
        "/ count",
    ),
    ("maxrl subtracts nothing", "grpo/estimators.py", "(groups - mean) / mean", "groups / mean"),
    (
        "pass_at_k of k - 1",
        "grpo/estimators.py",
        "best = [math.comb(j, k - 1) / subsets",
        "best = [math.comb(j, k - 2) / subsets",
    ),
    (
        "the KL's weight is not applied",
        "grpo/losses.py",
        "value = value + settings.beta * kl_estimate(",
        "value = value + kl_estimate(",
    ),
)

BONUS = in_files(
    "tests/exploration",
    (
        "bald is credited to its own token",
        "exploration/disagreement.py",
        'reward = next_own if measure == "bald" else own[:, t]',
        'reward = next_own if measure != "bald" else own[:, t]',
        "credit",
    ),
    (
        "the staircase starts a stair down",
        "exploration/bonus.py",
        "math.floor(4 * progress) / 4",
        "math.ceil(4 * progress) / 4",
        "staircase",
    ),
    (
        "the discount is on the token itself",
        "exploration/disagreement.py",
        "torch.where(valid[:, t], reward + discount * following, following)",
        "torch.where(valid[:, t], discount * reward + following, following)",
        "credit",
    ),
    (
        "the gate pays solved completions",
        "exploration/bonus.py",
        '"incorrect": ~solved',
        '"incorrect": solved',
        "epochs",
    ),
    (
        "the RMS forgets its correction",
        "exploration/bonus.py",
        "self.weight = keep * self.weight + new",
        "self.weight = 1.0",
        "members",
    ),
    (
        "a sum in place of the mean",
        "exploration/bonus.py",
        "/ kept.sum(-1).clamp_min(1)).float()",
        ").float()",
        "epochs",
    ),
    (
        "the clip is left out",
        "exploration/bonus.py",
        "weight * size.clamp(-clip, clip) * per_row",
        "weight * size * per_row",
        "members",
    ),
)

MEMBERS = in_files(
    "tests/disagreement",
    (
        "masks do not depend on the step",
        "disagreement/masks.py",
        'f"{step}/{member}/{layer}/{site}", width',
        'f"0/{member}/{layer}/{site}", width',
        "members",
    ),
    ("masks do not depend on the seed", "disagreement/masks.py", "{spec.seed}/{name}", "0/{name}", "last_k"),
    (
        "masks are not scaled",
        "disagreement/masks.py",
        "kept.astype(np.float32) / np.float32(1.0 - spec.dropout)",
        "kept.astype(np.float32)",
        "members",
    ),
    ("a layer too few", "disagreement/hooks.py", "return count - last_k", "return count - last_k + 1", "last_k"),
    ("the MLP is not masked", "disagreement/hooks.py", "enumerate(blocks)]", "enumerate(blocks[:1])]", "members"),
    (
        "bald is a sum over members",
        "disagreement/information.py",
        "divergence.mean(-1).clamp(0,",
        "divergence.sum(-1).clamp(0,",
        "members",
    ),
    (
        "a token is read one late",
        "disagreement/reading.py",
        "states = read[:, batch.rows, (batch.tokens - 1).clamp_min(0)]",
        "states = read[:, batch.rows, batch.tokens.clamp_max(read.shape[2] - 1)]",
        "members",
    ),
)
