"""Which gates of UBN a threshold would shut: the similarity of every norm layer on your data.

    python tools/survey_similarity.py CONFIG --data-root DIR       # some batches through the model
    python tools/survey_similarity.py work_dirs/run                # or what a training recorded

The model may have BatchNorm or UBN, the config may be mmdet's or mmpretrain's. Training
batches go through it in training mode, nothing is trained. Similarities move during
training: give ``--checkpoint`` where there is one, or the folder of a run with
``CondensationHook``, of which the last epoch counts. Prints a table and draws it.
"""

import argparse
import csv
from pathlib import Path
from typing import Any, Optional, Sequence

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from mmengine.runner import Runner, load_checkpoint, set_random_seed
from torch import nn
from tqdm import tqdm

import mmubn  # noqa: F401  registers UBN for configs without custom_imports
from mmubn.cli.checkpoint_check import check_pretrained
from mmubn.cli.data_check import check_data
from mmubn.cli.errors import CommandError, command
from mmubn.cli.norm_check import check_norms
from mmubn.cli.options import load_config, make_parser
from mmubn.similarity_survey import (
    THRESHOLDS,
    SimilaritySurvey,
    read_survey,
    survey_similarity,
)


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument('--checkpoint', help='weights to measure with (default: initial ones)')
    parser.add_argument('--batches', type=int, default=20, help='how many (default: 20)')
    parser.add_argument('--layers', default='', help='regular expression of the layers (all)')
    parser.add_argument(
        '--thresholds', type=float, nargs='+', default=THRESHOLDS, help='(0.05, 0.1, ... 0.5)'
    )
    parser.add_argument('--out', type=Path, default=Path(), help='folder of the CSV and picture')
    args = parser.parse_args(argv)
    if args.batches < 1:
        raise CommandError(f'--batches must be at least 1, got {args.batches}')
    return args


def survey_run(path: Path, thresholds: Sequence[float]) -> SimilaritySurvey:
    """Of a work dir, or of the table itself."""
    try:
        return read_survey(path, thresholds)
    except FileNotFoundError as error:
        raise CommandError(
            f'{error.filename}: no such file; train with '
            "custom_hooks=[dict(type='CondensationHook')]"
        ) from error
    except ValueError as error:
        raise CommandError(str(error)) from error


def survey_config(cfg: Config, args: argparse.Namespace) -> SimilaritySurvey:
    """Of the config's model on its training batches."""
    check_norms(cfg)
    check_data(cfg, ('train',))
    # Without a line for each weight that is initialised.
    MMLogger.get_instance('mmubn', log_level='WARNING')
    seed = cfg.get('randomness', {}).get('seed') or 0
    set_random_seed(seed)
    if args.checkpoint is None:
        check_pretrained(cfg)
    model = MODELS.build(cfg.model)
    checkpoint = args.checkpoint or cfg.get('load_from')
    if checkpoint is None:
        model.init_weights()
    elif not Path(checkpoint).is_file() and '://' not in checkpoint:
        raise CommandError(f'--checkpoint: no file {checkpoint}')
    else:
        load_checkpoint(model, checkpoint, map_location='cpu')
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=seed)
    total = min(args.batches, len(loader))
    try:
        with tqdm(loader, total=total, unit='batch', mininterval=1) as batches:
            return survey_similarity(
                model.to(get_device()), batches, args.batches, args.thresholds, _step, args.layers
            )
    except ValueError as error:
        raise CommandError(f'{args.config}: {error}') from error


def _step(model: nn.Module, batch: Any) -> None:
    """What a training step of an OpenMMLab model runs, as far as the losses."""
    batch = model.data_preprocessor(batch, True)
    if isinstance(batch, dict):
        model(**batch, mode='loss')
    else:
        model(*batch, mode='loss')


@command
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measures or reads, prints, writes and draws."""
    args = parse_args(argv)
    source = Path(args.config)
    if source.is_dir() or source.suffix == '.csv':
        survey = survey_run(source, args.thresholds)
    else:
        survey = survey_config(load_config(args), args)
    print(survey)
    args.out.mkdir(parents=True, exist_ok=True)
    table, picture = (args.out / f'similarity_survey.{kind}' for kind in ('csv', 'png'))
    rows = survey.to_list()
    with table.open('w', newline='') as file:
        writer = csv.DictWriter(file, rows[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    survey.plot(picture)
    print(table, picture, sep='\n')


if __name__ == '__main__':
    main()
