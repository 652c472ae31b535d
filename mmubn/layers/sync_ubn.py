"""UBN whose statistics and similarity are those of all processes."""

import copy
from typing import Any, Optional

from torch import Tensor, distributed
from torch.nn.modules.batchnorm import _BatchNorm

from .. import ops
from .ubn import UBN


class SyncUBN(UBN, _BatchNorm):
    r"""UBN over the batches of all processes of a group.

    With :math:`n_r, \mu_r, \sigma^2_r` the number of values a channel, mean and biased
    variance of :math:`X_c` on rank r, and :math:`s_r, p_r` the mean similarity and the
    number of pairs of images there,

    .. math::
        \mu = \frac{\sum_r n_r \mu_r}{\sum_r n_r}, \qquad
        \sigma^2 = \frac{\sum_r n_r (\sigma^2_r + (\mu_r - \mu)^2)}{\sum_r n_r}, \qquad
        s = \frac{\sum_r p_r s_r}{\sum_r p_r},

    everything else is as in :class:`UBN`. Pairs of images on different ranks do not
    count: they would send whole feature maps. Every rank computes :math:`\mu, \sigma^2`
    and s from the same numbers. So :math:`\tau`, the gate and the running statistics stay
    equal bit for bit if they were equal at the start, which DistributedDataParallel
    ensures.

    Ranks may hold images of different sizes, different numbers of images, or none. One
    value per channel is enough on a rank. A training step takes one ``all_gather`` of
    2 C + 3 numbers forward and one ``all_reduce`` of 2 C numbers backward, whatever the
    gate says. So all ranks have to call the layer equally often. Evaluation communicates
    nothing. In a group of one process, or without a group, the layer is UBN. Under
    activation checkpointing the ``all_gather`` runs again with the segment: a layer that
    is called several times could not tell which of its earlier results to take.

    Args:
        process_group (torch.distributed.ProcessGroup, optional): As in
            ``nn.SyncBatchNorm``, by name only. Default: all processes.

    The other arguments, the shapes and the errors are those of :class:`UBN`. In training in a
    group of several processes a gradient of a gradient, torch.func, forward mode, batched
    gradients and traces are a RuntimeError.

    Source: ours; the paper does not say which statistics it uses on several GPUs. The
    combination of the variances is Chan et al., "Updating formulae and a pairwise
    algorithm for computing sample variances", 1979.

    Examples:
        >>> norm_cfg = dict(type='SyncUBN', fct=0.15)
    """

    def __init__(self, *args, process_group: Optional[Any] = None, **settings) -> None:
        super().__init__(*args, **settings)
        self.process_group = process_group

    def __deepcopy__(self, memo: dict) -> 'SyncUBN':
        """A copy in the same group, which itself cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _group(self) -> Optional[Any]:
        """The group to synchronise over, None where there is nothing to synchronise."""
        if not (self.training and distributed.is_available() and distributed.is_initialized()):
            return None
        group = self.process_group or distributed.group.WORLD
        return group if distributed.get_world_size(group) > 1 else None

    def _forward_empty(self, x: Tensor, parameters: ops.Parameters, buffers: ops.Buffers) -> Tensor:
        if self._group() is None:
            return super()._forward_empty(x, parameters, buffers)
        # The other ranks wait for this one, forward and backward.
        images = x.reshape(0, x.shape[1], 1, 1)
        return self._step(images, parameters, buffers).reshape(x.shape)

    def _check_count(self, x: Tensor) -> None:
        if self._group() is None:  # the other ranks may hold more than one value
            super()._check_count(x)
