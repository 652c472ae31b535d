"""Makes the randomness of an epoch a function of the seed and of its place in the training."""

from functools import partial

import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, set_random_seed


class EpochSeedHook(Hook):
    """Seeds anew before every epoch, so that a resumed run draws what the undisturbed one drew.

    A checkpoint of mmengine holds weights, optimizer and schedule, and its samplers are
    seeded by the number of the epoch. But augmentation and the sampling of proposals draw
    from random generators, whose state is lost with the process.

    Before every epoch this hook seeds the generators of Python, NumPy and PyTorch from
    ``randomness.seed`` and the iteration. It does so in this process and in the workers
    of the training dataloader. The workers are started again for that, because
    ``persistent_workers`` would keep their generators. So a run that resumes at the end of
    an epoch ends with the same weights as a run without a break, on one process with
    deterministic kernels.

    A run without ``randomness.seed`` is left as it is.

    Where a run is resumed with epochs of another length, as on another number of processes, the
    log says so: it cannot repeat the first run, and mmengine keeps schedules by iteration as
    they were saved.

    An iteration-based loop is one long epoch. A resumed run then sees the same samples in
    the same order, and draws other augmentations.

    Examples:
        >>> custom_hooks = [dict(type='EpochSeedHook')]
        >>> randomness = dict(seed=0)
    """

    # Before the hooks that draw something themselves.
    priority = 'VERY_HIGH'

    def before_train(self, runner) -> None:
        """Warns of a resumed run whose epochs have another length."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            return
        epoch, length = runner.epoch, len(runner.train_dataloader)
        if not epoch * length <= runner.iter < (epoch + 1) * length:
            runner.logger.warning(
                f'resumed at epoch {epoch}, iteration {runner.iter}, but an epoch now has {length} '
                'iterations: the number of processes, the batch size or the data is another. '
                'Schedules by iteration (convert_to_iter_based, by_epoch=False) go on as they were '
                'saved and end too early or too late; resume with the same numbers, or start from '
                'the weights by load_from without resume'
            )

    def before_train_epoch(self, runner) -> None:
        """Seeds this process and the workers to come."""
        # That of the config; Runner.seed has one that was drawn as well.
        if runner._randomness_cfg.get('seed') is None:
            return
        sequence = np.random.SeedSequence([runner.seed, runner.iter])
        # Small enough for mmengine to add the number of a worker to it.
        seed = int(sequence.generate_state(1)[0] >> 1)
        set_random_seed(seed, deterministic=False)
        loader = runner.train_dataloader
        init = loader.worker_init_fn
        if 'seed' in getattr(init, 'keywords', {}):  # mmengine's, or one of the config like it
            loader.worker_init_fn = partial(init, seed=seed)
        loader._iterator = None  # of persistent workers; there is no public way to end them
