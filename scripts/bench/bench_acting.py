"""Sampling from members (rollout.members) against sampling from the policy, in turn, in one run.

    python scripts/bench/bench_acting.py [--prompts 2] [--prompt 128] [--new 64] [--group 8] [--repeats 5] [--json PATH]

The model and case of bench_rollout.py. Every layer is in scope; each prompt has a member of its own. Printed: medians
and the median of the pairs' ratios.
"""

from __future__ import annotations

import statistics

import torch
from bench_rollout import PAD, build_model
from harness import parser_of, seconds_of, write_results

from vdr_cli.disagreement.acting import by_position
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Sampling


def main() -> None:
    parser = parser_of(__doc__)
    for name, default in (("--prompts", 2), ("--prompt", 128), ("--new", 64), ("--group", 8), ("--repeats", 5)):
        parser.add_argument(name, type=int, default=default)
    for name, default in (("--layers", 12), ("--width", 512), ("--vocabulary", 32_000), ("--threads", 2)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(args.layers, args.width, args.vocabulary)
    ids = torch.randint(1, args.vocabulary, (args.prompts, args.prompt)).tolist()
    rollout, spec = TransformersRollout(PAD, []), EnsembleSpec(members=8)

    def sample(members: bool) -> tuple[float, float]:
        block = by_position(spec, 0, range(args.prompts)) if members else None
        request = RolloutRequest(
            ids, args.group, Sampling(max_new_tokens=args.new), list(range(args.prompts)), acting=block
        )
        return seconds_of(lambda: rollout.generate(model, request), "cpu")

    pairs = [(sample(members=False), sample(members=True)) for _ in range(args.repeats + 1)][1:]  # the first warms up
    plain, acting = (statistics.median(pair[side][0] for pair in pairs) for side in (0, 1))
    ratio, cpu_ratio = (statistics.median(b[kind] / a[kind] for a, b in pairs) for kind in (0, 1))
    print(f"policy   {plain:.2f} s   members   {acting:.2f} s   (medians of {args.repeats})")
    print(f"ratio    {ratio:.3f} wall, {cpu_ratio:.3f} processor time   (medians of the pairs)")
    results = {"policy": plain, "members": acting, "ratio": ratio, "cpu_ratio": cpu_ratio}
    write_results(args.json, results)


if __name__ == "__main__":
    main()
