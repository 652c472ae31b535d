"""Which gates of UBN a threshold would shut: the similarity of every norm layer on your data.

    python tools/survey_similarity.py CONFIG --data-root DIR       # some batches through the model
    python tools/survey_similarity.py work_dirs/run                # or what a training recorded

The model may have BatchNorm or UBN, the config may be mmdet's or mmpretrain's. Training
batches go through it in training mode, nothing is trained. Similarities move during
training: give ``--checkpoint`` where there is one, or the folder of a run with
``CondensationHook``, of which the last epoch counts. Prints a table and draws it.
"""

import argparse
from pathlib import Path
from typing import Optional, Sequence

import mmubn  # noqa: F401  registers UBN for configs without custom_imports
from mmubn.cli.argument_types import count
from mmubn.cli.errors import CommandError, command, user_error
from mmubn.cli.options import load_config, make_parser
from mmubn.cli.survey import survey_config
from mmubn.similarity_survey import THRESHOLDS, read_survey
from mmubn.writing import check_folder, write_csv

# Options that say nothing of a run.
_OF_A_CONFIG = ('data_root', 'cfg_options', 'checkpoint', 'batches', 'layers')


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, starts_runner=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        '--checkpoint', help='weights to measure with (default: those that the config starts from)'
    )
    parser.add_argument('--batches', type=count, help='number of batches (default: 20)')
    parser.add_argument('--layers', default='', help='regular expression of the layers (all)')
    parser.add_argument(
        '--thresholds',
        type=float,
        nargs='+',
        default=THRESHOLDS,
        help='values of fct (0.05, 0.1, ... 0.5)',
    )
    parser.add_argument(
        '--out', type=Path, default=Path(), help='folder of the CSV and picture (.)'
    )
    return parser.parse_args(argv)


@command
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measures or reads, prints, writes and draws."""
    args = parse_args(argv)
    check_folder('--out', args.out)
    source = Path(args.config)
    if source.is_dir() or source.suffix == '.csv':
        for name in _OF_A_CONFIG:
            if getattr(args, name):
                key = name.replace('_', '-')
                raise CommandError(f'--{key}: needs a config; {source} has what a run recorded')
        with user_error(FileNotFoundError, ValueError):
            survey = read_survey(source, args.thresholds)
    else:
        cfg, batches = load_config(args), args.batches or 20
        survey = survey_config(cfg, args.checkpoint, batches, args.thresholds, args.layers)
    print(survey)
    table, picture = (args.out / f'similarity_survey.{kind}' for kind in ('csv', 'png'))
    rows = survey.to_list()
    write_csv(table, rows[0], (row.values() for row in rows))
    survey.plot(picture)
    print(table, picture, sep='\n')


if __name__ == '__main__':
    main()
