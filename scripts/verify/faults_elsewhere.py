"""Faults of sampling, data, rewards, statistics, and of what is made beside a training run."""

from __future__ import annotations

from fault_rows import in_files

ELSEWHERE = [
    *in_files(
        "tests/rollout",
        (
            "top-k keeps one more",
            "rollout/sampling.py",
            "TopKLogitsWarper(top_k=sampling.top_k)",
            "TopKLogitsWarper(top_k=sampling.top_k + 1)",
            "quantile",
        ),
        (
            "all completions of a group are one",
            "rollout/transformers_backend.py",
            "(request.keys[row.prompt], row.completion) for row",
            "(request.keys[row.prompt], 0) for row",
            "members",
        ),
        (
            "every completion is truncated",
            "rollout/transformers_backend.py",
            "leave(rows, t + 1, ~done)",
            "leave(rows, t + 1, done)",
            "members",
        ),
    ),
    *in_files(
        "tests/data",
        ("every pass in the same order", "data/order.py", "[seed % 2**64, epoch]", "[seed % 2**64, 0]", "epochs"),
        ("prompts keep their first tokens", "data/prompts.py", "return ids[-limit:]", "return ids[:limit]"),
    ),
    *in_files(
        "tests/rewards",
        (
            "None is 0",
            "rewards/calling.py",
            "    if entry is None:\n        return math.nan\n",
            "    if entry is None:\n        return 0.0\n",
            "rewards",
        ),
        (
            "weights are 1",
            "rewards/loading.py",
            "        entry.weight,",
            "        1.0,",
            "rewards",
        ),
    ),
    *in_files(
        "tests/beds",
        (
            "countdown ignores the numbers",
            "beds/countdown.py",
            "sorted(found[0]) == sorted(numbers) and found[1] == target",
            "found[1] == target",
        ),
    ),
    *in_files(
        "tests/stats",
        (
            "pass@k with replacement",
            "stats/passk.py",
            "(drawn - solved - j, 0.0) / (drawn - j)",
            "(drawn - solved, 0.0) / drawn",
        ),
        ("intervals of one tail", "stats/bootstrap.py", "tail = (1.0 - LEVEL) / 2.0", "tail = 1.0 - LEVEL"),
        ("ties count as found", "stats/ranking.py", "(below + right / 2)", "(below + right)"),
    ),
    *in_files(
        "tests/scoring",
        (
            "padding counts in sums",
            "scoring/columns.py",
            '"bald_sum": _array((bald.double() * mask).sum(1))',
            '"bald_sum": _array(bald.double().sum(1))',
        ),
        (
            "the mean's denominator is the width",
            "scoring/columns.py",
            "return (values.double() * mask).sum(1) / mask.sum(1)",
            "return (values.double() * mask).mean(1)",
        ),
    ),
    *in_files(
        "tests/evaluation",
        (
            "entropy a completion",
            "evaluation/result.py",
            'parts["entropy"] = self.entropy_sum.sum(1), self.length.sum(1).astype(np.float64)',
            'parts["entropy"] = _summed(self.entropy_sum)',
        ),
    ),
    *in_files(
        "tests/config",
        (
            "the starter's recipe over the user's settings",
            "config/recipe.py",
            "deep_merge(bed_recipe(_model_name(tree)), tree)",
            "deep_merge(tree, bed_recipe(_model_name(tree)))",
        ),
    ),
    *in_files("tests/planning", ("tied heads counted twice", "planning/shape.py", "(1 if self.tied else 2)", "2")),
    *in_files(
        "tests/report",
        ("the worst measure on top", "report/intervals.py", "key=lambda row: -row.value", "key=lambda row: row.value"),
    ),
    *in_files(
        "tests/launch",
        (
            "a slot too few on a host",
            "launch/hostfile.py",
            "hosts[name] = list(range(slots))",
            "hosts[name] = list(range(slots - 1))",
        ),
    ),
]
