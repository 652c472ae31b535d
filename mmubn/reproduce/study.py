"""How the rows of an experiment are trained, where that is more than their configs.

The trainings themselves are in :mod:`mmubn.reproduce.run_study`.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

LEARNING_RATE = 'optim_wrapper.optimizer.lr'
WEIGHT_DECAY = 'optim_wrapper.optimizer.weight_decay'
TRAINING_IMAGES = 'train_dataloader.dataset.indices'


@dataclass(frozen=True)
class Study:
    """How the rows of an experiment are trained.

    Attributes:
        seeds (int): Seeds of each row, unless ``--seeds`` says otherwise.
        grid (dict): Setting -> the values that are tried, in all combinations.
        metric (str): By which the best is chosen, after the last epoch.
        validation (dict): Options by which a tuning run validates on a part of the
            training set, or of its pictures, that it does not train on.
        tuning_budget (float): Length of a tuning run by that of the row.
        tuned_for (str): Norm of the one row that is tuned for all; empty: each row is.
        pretraining (str): Config in ``configs/`` of the backbone that rows start from.
        prepare (Callable, optional): Makes the data of the rows of the folders of
            ``--data-root``, in a folder of the work dir, which it returns.
        folder (str): Of ``--data-root``, that with the data of the rows, where these are not
            made; empty: it is ``--data-root`` itself.
        pretraining_folder (str): That with the pretraining's data.
    """

    seeds: int
    grid: Dict[str, Sequence[float]]
    metric: str
    validation: Dict[str, Any]
    tuning_budget: float = 1
    tuned_for: str = ''
    pretraining: str = ''
    prepare: Optional[Callable[[Path, Path], Path]] = None
    folder: str = ''
    pretraining_folder: str = ''

    @property
    def points(self) -> List[Dict[str, float]]:
        """The points of the grid."""
        return [dict(zip(self.grid, values)) for values in product(*self.grid.values())]

    def at_edge(self, point: Dict[str, float]) -> bool:
        """Whether a wider grid might have a better one."""
        return any(v in (min(self.grid[k]), max(self.grid[k])) for k, v in point.items())
