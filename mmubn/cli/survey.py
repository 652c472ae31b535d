"""The survey of similarities, of a config's model."""

from typing import Any, Optional, Sequence

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from mmengine.runner import Runner, load_checkpoint, set_random_seed
from torch import nn
from tqdm import tqdm

from ..condensation import CondensationRecorder
from ..similarity_survey import SimilaritySurvey, survey_similarity
from .checkpoint_check import (
    check_fit,
    check_load_from,
    check_pretrained,
    read_checkpoint,
)
from .data_check import check_data
from .errors import user_error
from .model import build_model
from .norm_check import check_norms


def survey_config(
    cfg: Config,
    checkpoint: Optional[str],
    num_batches: int,
    thresholds: Sequence[float],
    layers: str,
) -> SimilaritySurvey:
    """Of the config's model on its training batches.

    Args:
        cfg (Config): The resolved config.
        checkpoint (str, optional): Weights to measure with. Default: those that the config
            starts from.
        num_batches (int): How many batches to take at most.
        thresholds (Sequence[float]): To report on.
        layers (str): As in :func:`mmubn.record_condensation`.

    Raises:
        CommandError: Norms, data or weights that cannot be used; no similarity.
    """
    check_norms(cfg)
    checked = build_model(cfg)
    with user_error(ValueError, of=cfg.filename):
        CondensationRecorder(checked, layers)  # before the data, which may take long to read
    check_data(cfg, ('train',))
    # Without a line for each weight that is initialised.
    MMLogger.get_instance('mmubn', log_level='WARNING')
    seed = (cfg.get('randomness') or {}).get('seed') or 0
    set_random_seed(seed)
    if checkpoint is not None:
        weights = read_checkpoint('--checkpoint', checkpoint)
        check_fit('--checkpoint', checkpoint, weights, cfg, checked)
    else:
        check_pretrained(cfg, checked)
        if cfg.get('load_from'):
            check_load_from(cfg, checked)
    model = MODELS.build(cfg.model)
    checkpoint = checkpoint or cfg.get('load_from')
    if checkpoint is None:
        model.init_weights()
    else:
        load_checkpoint(model, checkpoint, map_location='cpu')
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=seed)
    total = min(num_batches, len(loader))
    progress = tqdm(loader, total=total, unit='batch', mininterval=1)
    with user_error(ValueError, of=cfg.filename), progress as batches:
        return survey_similarity(
            model.to(get_device()), batches, num_batches, thresholds, _step, layers
        )


def _step(model: nn.Module, batch: Any) -> None:
    """What a training step of an OpenMMLab model runs, as far as the losses."""
    batch = model.data_preprocessor(batch, True)
    if isinstance(batch, dict):
        model(**batch, mode='loss')
    else:
        model(*batch, mode='loss')
