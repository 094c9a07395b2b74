"""Print how far our logits are from those of timm and transformers with the same weights, for every variant.

python tools/weight_parity.py [--only=deit3] [--json=FILE]

Needs torch, timm and transformers (pip install -e '.[peers]'); nothing is downloaded, weights are random and scattered.
Exit code 1 where a logit differs by more than 1e-4 or weights do not come back bit for bit. The whole table takes
minutes and, for the largest variant, 16 GB.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tqdm
from absl import flags

from deit import cli, errors, workdir

ONLY = flags.DEFINE_string(
    "only", "", "Regular expression: only the comparisons (`VARIANT SOURCE SIZE`) it is found in."
)
JSON = flags.DEFINE_string("json", "", "Also write the table to this file, which must not exist.")


def main(_) -> int:
    """Compare and print the table."""
    out = cli.new_file("--json", JSON.value)
    try:
        wanted = re.compile(ONLY.value)
    except re.error as error:
        raise errors.UserError(f"--only ({ONLY.value}) must be a regular expression: {error}") from None
    from tools import peer_packages, peers  # TensorFlow starts only now

    if peer_packages.missing():
        raise errors.UserError(f"{', '.join(peer_packages.missing())} must be installed: pip install -e '.[peers]'")
    cases = [case for case in peers.CASES if wanted.search(str(case))]
    if not cases:
        raise errors.UserError(f"--only ({ONLY.value}) is found in no comparison, such as {peers.CASES[0]}")
    rows = [peers.compare(case) for case in tqdm.tqdm(cases, unit="network", disable=None)]
    print("| variant | weights of | px | max abs difference | largest logit | parameters | back, bit for bit |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        back = {True: "yes", False: "NO", None: ""}[row.round_trip]
        print(
            f"| `{row.case.variant}` | {row.case.source} | {row.case.size} | {row.difference:.1e} | "
            f"{row.largest:.2f} | {row.parameters:,} | {back} |"
        )
    if out:
        content = json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n"
        workdir.write(out, content.encode())
    return int(not all(row.agrees for row in rows))


if __name__ == "__main__":
    cli.run(main)
