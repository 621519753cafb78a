"""What the authors' CM does, where, and by which part of it: arms x seeds in two settings.

    python -m experiments.study                      # every stage, what has no row yet
    python -m experiments.study --stage question     # one stage (study.py has them)
    python -m experiments.study --table              # verdicts, tables and pictures of the rows

Options that aren't its own go to every run of cm.py. A killed run goes on from its last checkpoint;
what has its row is never run again. README.md beside this file says what a row is.
"""

import os
from pathlib import Path

from experiments import common
from experiments.study import study, tables


@common.interruptible
def main(argv=None):
    parser = common.parser(__file__, __doc__)
    parser.add_argument("--stage", choices=study.STAGES, nargs="+", default=list(study.STAGES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="where runs lie")
    parser.add_argument("--num-images", type=int, default=2500, help="generated images a row")
    args, flags = parser.parse_known_args(argv)
    if args.table and flags:
        raise ValueError(f"{flags[0]} has no meaning beside --table")
    if not args.table:
        study.study(args.stage, args.rows, args.runs, flags, args.jobs, args.num_images)
    rows = common.numbers(common.read_table(args.rows), study.WORDS)
    print(tables.everything(rows))
    tables.draw(rows, args.assets)


if __name__ == "__main__":
    main()
