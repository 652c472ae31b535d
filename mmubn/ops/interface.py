r"""What a backend has to fill, and what a step of a layer is made of.

Symbols and shapes, here and in every backend: X the input, (N, C, H, W); m and v its mean and
biased variance over H and W, (N, C); :math:`\mu, \sigma^2` the statistics that normalise
:math:`X_c = X + w_m \odot m`, (C,); K the effective taps :math:`\gamma \odot` ``kernel``,
(C, k, k). With

.. math::
    h = w_m m - \mu, \qquad
    r = 1 / \sqrt{\sigma^2 + \epsilon}, \qquad
    t = (m + h) r, \qquad
    g = \mathrm{sigmoid}(w_v t + w_b), \qquad
    a = g r,

Eqs. 4 and 5 of the paper (arXiv 2311.15993) become

.. math::
    X_r = a \, (X + h), \qquad Y = \mathrm{dwconv}_k(X_r; K) + \beta .

So the backward pass needs X and O(N C) numbers, which is BatchNorm's memory; the literal
composition keeps three tensors of X's size. X + h is formed before it is scaled, as a large
mean would cancel badly in a X + b. docs/speed.md derives the backward pass.

A training step is

1. :meth:`Backend.measure`: what this process knows of its batch, a row of 2 C + 3 numbers;
2. in SyncUBN, one collective that makes the rows of all processes of it;
3. :meth:`Backend.normalize`: from the rows to similarity, gate, running statistics and Y;

and backwards

4. :meth:`Backend.backward_sums`: every sum over pixels, and the gradient of the statistics;
5. in SyncUBN, one collective that adds that gradient up;
6. :meth:`Backend.backward_input`: dX.

One process alone calls :meth:`Backend.forward`, which is 1 and 3, and :meth:`Backend.backward`,
4 and 6.

Numbers a channel or an image and channel have the dtype of the statistics: float32, for
float64 input float64. Parameters and buffers may have another, which a backend converts.
"""

from abc import abstractmethod
from typing import Any, NamedTuple, Optional, Protocol, Tuple

from torch import Tensor


class Parameters(NamedTuple):
    """The parameters of a layer, or their gradients; None where a switch is off."""

    weight: Optional[Tensor] = None
    r""":math:`\gamma`, (C,)."""

    kernel: Optional[Tensor] = None
    """K before it is scaled by the weight, (C, 1, k, k); None is k = 1."""

    bias: Optional[Tensor] = None
    r""":math:`\beta`, (C,)."""

    center_weight: Optional[Tensor] = None
    """:math:`w_m`, (C,)."""

    scale_weight: Optional[Tensor] = None
    """:math:`w_v`, (C,)."""

    scale_bias: Optional[Tensor] = None
    """:math:`w_b`, (C,)."""

    @property
    def kernel_size(self) -> int:
        """The side k of the taps."""
        return 1 if self.kernel is None else self.kernel.shape[-1]


class Buffers(NamedTuple):
    """The state of a layer, which a training step moves in place."""

    running_mean: Optional[Tensor] = None
    """(C,), or None without running statistics."""

    running_var: Optional[Tensor] = None
    """Unbiased, (C,)."""

    num_batches_tracked: Optional[Tensor] = None
    """Scalar int64: batches that entered the running statistics."""

    running_similarity: Optional[Tensor] = None
    r""":math:`\tau`, scalar."""

    gate: Optional[Tensor] = None
    """Scalar bool: whether the last step used the statistics of the batch. A step that is run
    again in the backward pass reads it."""

    steps: Optional[Tensor] = None
    """Scalar int64 on the CPU: training steps so far; None where each measures the similarity."""


class Settings(NamedTuple):
    """What a step does; numbers and switches, no tensors."""

    eps: float = 1e-5
    r""":math:`\epsilon`."""

    training: bool = True
    """Whether the statistics of the batch normalise (where the gate is open), else the
    running ones do and nothing moves."""

    momentum: Optional[float] = 0.1
    """Weight of the batch in the running statistics; None is the cumulative average."""

    fct: Optional[float] = None
    """Threshold of the gate; None is a gate that is always open."""

    similarity_weight: float = 0.1
    r"""Weight of a measured similarity in :math:`\tau`."""

    interval: int = 1
    """Measures the similarity in every so many steps."""

    stride: int = 1
    """Measures the similarity on every so many rows and columns."""

    warmup: int = 0
    """Batches that must be in the running statistics before the gate may shut."""

    update: bool = True
    """Whether the buffers move; not when a step is run again for its backward pass."""

    scale_from_input: bool = False
    """Whether the sigmoid sees m in place of t, as in IEBN."""

    def needs_image_mean(self, parameters: Parameters) -> bool:
        """Whether m has any effect in this step."""
        calibrated = parameters.center_weight is not None or parameters.scale_weight is not None
        return self.training or calibrated


class Sums(NamedTuple):
    """What :meth:`Backend.backward_sums` hands on."""

    d_statistics: Tensor
    r"""(2, C): what reaches :math:`\mu` and :math:`\sigma^2`, of this process."""

    gradients: Parameters
    """All but that of the center weight. There is one of the bias whether or not the layer has
    it: backward is not given the bias, which it need not keep."""

    rest: Any
    """What the backend's own :meth:`Backend.backward_input` wants to find again."""


class Backend(Protocol):
    """Does the work of a step on one kind of device; one object, without state of its own.

    A backend is a subclass that fills the abstract methods.
    """

    name: str
    """What the layers' ``backend=`` calls it."""

    @abstractmethod
    def why_not(self, x: Tensor, kernel_size: int) -> str:
        """Why it cannot serve ``x`` with taps of that size, in a few words; '' where it can."""

    def forward(
        self, x: Tensor, stride: int, parameters: Parameters, buffers: Buffers, settings: Settings
    ) -> Tuple[Tensor, Optional[Tensor], Tensor]:
        """:meth:`measure` and :meth:`normalize`, for a training step of one process.

        A backend may make one call of the two.
        """
        image_mean, row = self.measure(x, parameters.center_weight, stride)
        return self.normalize(x, image_mean, row[None], parameters, buffers, settings)

    def backward(
        self,
        x: Tensor,
        dy: Tensor,
        image_mean: Optional[Tensor],
        statistics: Tensor,
        parameters: Parameters,
        settings: Settings,
    ) -> Tuple[Tensor, Parameters]:
        """:meth:`backward_sums` and :meth:`backward_input`, of one process: all gradients."""
        sums = self.backward_sums(x, dy, image_mean, statistics, parameters, settings)
        dx, d_center_weight = self.backward_input(
            x, statistics, sums.d_statistics, parameters, settings, sums
        )
        return dx, sums.gradients._replace(center_weight=d_center_weight)

    @abstractmethod
    def measure(
        self, x: Tensor, center_weight: Optional[Tensor], stride: int
    ) -> Tuple[Tensor, Tensor]:
        r"""What this process knows of its batch.

        .. math::
            \mu_c = \mathrm{mean}_n [(1 + w_m) m], \qquad
            \sigma^2_c = \mathrm{mean}_n [v] + \mathrm{var}_n [(1 + w_m) m]

        Variances are taken from centred values: E[x^2] - E[x]^2 cancels where the mean is
        large. The similarity is that of :func:`mmubn.ops.mean_cosine_similarity`.

        Args:
            x (Tensor): X; N is not 0, which :mod:`mmubn.ops.step` sees to.
            center_weight (Tensor, optional): :math:`w_m`, (C,).
            stride (int): Measures the similarity on every so many rows and columns; 0
                does not measure it.

        Returns:
            tuple[Tensor, Tensor]: m, (N, C), and the row, (2 C + 3,): number of values a
            channel, number of pairs of images, their mean similarity, :math:`\mu`,
            :math:`\sigma^2`. The second and third are 0 where there is no similarity.
        """

    @abstractmethod
    def normalize(
        self,
        x: Tensor,
        image_mean: Optional[Tensor],
        rows: Optional[Tensor],
        parameters: Parameters,
        buffers: Buffers,
        settings: Settings,
    ) -> Tuple[Tensor, Optional[Tensor], Tensor]:
        r"""The gate, the running statistics and the output.

        Moves the buffers in place where ``settings.update``: :math:`\tau` where the rows
        have a similarity; the gate; and, where the gate is open and the statistics are
        finite, the running ones. Never waits for the device.

        Args:
            x (Tensor): X.
            image_mean (Tensor, optional): m, of :meth:`measure`; None in evaluation, where
                it is computed if it has an effect.
            rows (Tensor, optional): (R, 2 C + 3), the rows of all processes, in which
                :math:`\mu = \sum_r n_r \mu_r / \sum_r n_r`,
                :math:`\sigma^2 = \sum_r n_r (\sigma^2_r + (\mu_r - \mu)^2) / \sum_r n_r`
                and the similarity is the mean over all pairs; None in evaluation.
            parameters (Parameters): Of the layer.
            buffers (Buffers): Of the layer.
            settings (Settings): Of the step.

        Returns:
            tuple[Tensor, Tensor, Tensor]: Y in the dtype and memory format of X; m, or None
            where it has no effect; and (2 C + 1,) statistics: :math:`\mu`, r and the weight
            of a value in :math:`\mu`, 1 / count or, where the gate is shut, 0.
        """

    @abstractmethod
    def backward_sums(
        self,
        x: Tensor,
        dy: Tensor,
        image_mean: Optional[Tensor],
        statistics: Tensor,
        parameters: Parameters,
        settings: Settings,
    ) -> Sums:
        """Every sum over the pixels, from X and dY.

        Args:
            x (Tensor): X.
            dy (Tensor): Gradient of Y, any strides.
            image_mean (Tensor, optional): m; None where it was not kept, and it is computed
                if it has an effect.
            statistics (Tensor): Those of :meth:`normalize`.
            parameters (Parameters): Of the layer.
            settings (Settings): Of the step.
        """

    @abstractmethod
    def backward_input(
        self,
        x: Tensor,
        statistics: Tensor,
        d_statistics: Tensor,
        parameters: Parameters,
        settings: Settings,
        sums: Sums,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Gradients of X and of the center weight.

        Args:
            x (Tensor): X.
            statistics (Tensor): As in :meth:`backward_sums`.
            d_statistics (Tensor): (2, C), those of ``sums`` added up over all processes.
            parameters (Parameters): Of the layer.
            settings (Settings): Of the step.
            sums (Sums): Of :meth:`backward_sums`.
        """

    @abstractmethod
    def squared_sum(self, x: Tensor, weight: Tensor) -> Tensor:
        """``|| sum_n weight_n X_n ||^2``, a scalar, of X (N, ...) and weight (N,)."""
