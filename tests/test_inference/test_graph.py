"""The convolution before a layer is taken where it is certain, and nowhere else."""

import types

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from weights import difference, trained

import mmubn
from mmubn import UBN, prepare_for_inference
from mmubn.inference.aside import Aside
from mmubn.inference.graph import read_forward


class Block(nn.Module):
    """A convolution and a layer; subclasses say how they are called."""

    reason = None

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = UBN(8)
        self.build()

    def build(self):
        pass

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class ReadTwice(Block):
    reason = 'its input is read elsewhere too'

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y.sigmoid()


class ReturnedToo(Block):
    reason = 'its input is read elsewhere too'

    def forward(self, x):
        y = self.conv(x)
        return [self.norm(y), {'raw': y}]


class ReadBefore(Block):
    reason = 'its input is read elsewhere too'

    def forward(self, x):
        y = self.conv(x)
        gate = y.mean()
        return self.norm(y) * gate


class Constant(Block):
    def forward(self, x):
        return self.norm(self.conv(x - torch.tensor(0.5)))


class ReturnedInAnObject(Block):
    """Of a class that torch does not know, as OpenMMLab's samples are."""

    reason = 'its input is read elsewhere too'

    def forward(self, x):
        y = self.conv(x)
        return types.SimpleNamespace(norm=self.norm(y), raw=y)


class Kept(Block):
    reason = 'its input is read elsewhere too'

    def forward(self, x):
        self.raw = self.conv(x)
        return self.norm(self.raw)


class KeptInAList(Block):
    reason = 'its input is read elsewhere too'

    def build(self):
        self.raw = []

    def forward(self, x):
        self.raw.append(self.conv(x))
        return self.norm(self.raw[-1])


class NextConvolutionReads(Block):
    reason = 'its input is read elsewhere too'

    def build(self):
        self.next = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + self.next(y)


class Between(Block):
    reason = 'it does not follow a convolution'

    def forward(self, x):
        return self.norm(self.conv(x).relu())


class AfterSum(Block):
    reason = 'it does not follow a convolution'

    def build(self):
        self.other = nn.Conv2d(3, 8, 1)

    def forward(self, x):
        return self.norm(self.conv(x) + self.other(x))


class SharedNorm(Block):
    reason = 'it is called on outputs of several layers'

    def build(self):
        self.other = nn.Conv2d(3, 8, 1)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm(self.other(x))


class SharedConvolution(Block):
    """As heads share convolutions between levels, each level with its own norm."""

    reason = 'the convolution before it serves other layers too'

    def build(self):
        self.other = UBN(8)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.other(self.conv(x + 1))


class ConvolutionAlone(Block):
    """Called once more, without the layer."""

    reason = 'the convolution before it serves other layers too'

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(x).tanh()


class NeverCalled(Block):
    reason = 'it is not called'

    def build(self):
        self.unused = self.norm
        self.norm = nn.Identity()


class WeightsRead(Block):
    reason = 'the weights of the convolution before it are read elsewhere'

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv.weight.mean()


class NormWeightsRead(Block):
    """As in normalization-based attention, which weighs channels by those of the layer."""

    reason = 'its weights are read elsewhere'

    def build(self):
        self.norm = mmubn.RBN(8)

    def forward(self, x):
        weight = self.norm.weight.data.abs()
        return self.norm(self.conv(x)) * (weight / weight.sum()).view(1, -1, 1, 1)


class BatchNormWeightsRead(NormWeightsRead):
    def build(self):
        self.norm = nn.BatchNorm2d(8)


class Scaled(nn.Conv2d):
    """As weight standardisation does it: not what its weight says."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


class OtherConvolution(Block):
    reason = 'it follows Scaled, a convolution of another kind'

    def build(self):
        self.conv = Scaled(3, 8, 3)


class WeightNorm(Block):
    reason = 'it follows ParametrizedConv2d, a convolution of another kind'

    def build(self):
        nn.utils.parametrizations.weight_norm(self.conv)


def scaled(conv, x):
    return F.conv2d(x, conv.weight - conv.weight.mean(), conv.bias, padding=1)


class ReplacedForward(Block):
    reason = 'the forward of the convolution before it was replaced on the layer'

    def build(self):
        self.conv.forward = types.MethodType(scaled, self.conv)


class ConvolutionHook(Block):
    reason = 'the convolution before it has hooks'

    def build(self):
        self.conv.register_forward_hook(lambda module, args, output: output + 1)


class NormHook(Block):
    reason = 'it has forward hooks'

    def build(self):
        self.norm.register_forward_hook(lambda module, args, output: 2 * output)


class BatchStatistics(Block):
    reason = 'it has no running statistics'

    def build(self):
        self.norm = mmubn.RBN(8, track_running_stats=False)


class CalledTwiceTogether(Block):
    """The pair runs on several levels: each call is of both, so it may fold."""

    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm(self.conv(x[..., ::2, ::2])).mean()


class ByKeyword(Block):
    def forward(self, x):
        return self.norm(input=self.conv(input=x))


class ReadByKeyword(Block):
    reason = 'its input is read elsewhere too'

    def build(self):
        self.next = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + self.next(input=y)


class TwoNames(Block):
    """Modules that are registered twice are replaced under both names."""

    def build(self):
        self.again = self.norm
        self.layers = nn.ModuleList([self.conv, self.norm])

    def forward(self, x):
        return self.again(self.conv(x)) + self.layers[1](self.layers[0](x - 1))


class Transposed(Block):
    def build(self):
        self.conv = nn.ConvTranspose2d(3, 8, 2, stride=2)


class TransposedGroups(Block):
    def build(self):
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 8, 2, groups=2))


class SharedWeight(Block):
    """Another convolution has the same weight: it keeps it."""

    def build(self):
        self.other = nn.Conv2d(3, 8, 3, padding=1)
        self.other.weight = self.conv.weight

    def forward(self, x):
        return self.norm(self.conv(x)) + self.other(x)


class SharedWeightReadByHand(Block):
    reason = 'the weights of the convolution before it are read elsewhere'

    def build(self):
        self.other = nn.Conv2d(3, 8, 3, padding=1)
        self.other.weight = self.conv.weight

    def forward(self, x):
        y = self.norm(self.conv(x)) + self.other(x)
        return y + nn.functional.conv2d(x, self.other.weight, padding=1)


class Holder(nn.Module):
    """Holds a module that is registered elsewhere: torch.fx takes it for a leaf."""

    def __init__(self, use, held):
        super().__init__()
        self.use = use
        self.held = [held]

    def forward(self, x):
        return self.use(self.held[0], x)


def call(conv, x):
    return conv(x)


def read_weight(conv, x):
    return conv.weight.mean() * x.mean()


def call_conv_of(block, x):
    return block.conv(x)


class HeldAndCalled(Block):
    reason = 'the convolution before it serves other layers too'

    def build(self):
        self.holder = Holder(call, self.conv)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.holder(x)


class HeldAndRead(HeldAndCalled):
    reason = 'the weights of the convolution before it are read elsewhere'

    def build(self):
        self.holder = Holder(read_weight, self.conv)


class HeldWithin(HeldAndCalled):
    """Not the convolution itself, but what it is registered in."""

    def build(self):
        self.holder = Holder(call_conv_of, self)


class HeldAndNotUsed(HeldAndCalled):
    """A run shows that the convolution may fold."""

    reason = None

    def build(self):
        self.holder = Holder(lambda conv, x: x.mean(), self.conv)


class HookReads(Block):
    reason = 'the weights of the convolution before it are read elsewhere'

    def build(self):
        self.relu = nn.ReLU()
        self.relu.register_forward_hook(self.hook)

    def hook(self, module, args, output):
        return output + self.conv.weight.mean()

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)))


class ReadsAnother(nn.Conv2d):
    """A convolution, too, with another registered inside."""

    def forward(self, x):
        return super().forward(x) + self.other.weight.mean()


class ConvolutionReads(Block):
    reason = 'the weights of the convolution before it are read elsewhere'

    def build(self):
        self.next = ReadsAnother(8, 8, 1)
        self.next.other = self.conv

    def forward(self, x):
        return self.next(self.norm(self.conv(x)))


class ReadingUBN(UBN):
    def forward(self, x):
        return super().forward(x) + self.held[0].weight.mean()


class NextNormReads(Block):
    reason = 'the weights of the convolution before it are read elsewhere'

    def build(self):
        self.next = ReadingUBN(8)
        self.next.held = [self.conv]

    def forward(self, x):
        return self.next(self.norm(self.conv(x)))


class InAList(Block):
    """forward takes the layers out of a list that registers nothing."""

    reason = 'a module holds it in a list or another attribute, out of which it is not taken'

    def build(self):
        self.steps = [self.conv, self.norm]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class HeldInAClosure(Block):
    """A copy of the model goes on to read the convolution of the model, which stays."""

    def build(self):
        self.relu = nn.ReLU()
        self.relu.register_forward_hook(lambda module, args, y: y + self.conv.weight.mean())

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)))


class GroupsAndNoBias(Block):
    def build(self):
        self.conv = nn.Conv2d(3, 9, 3, groups=3, bias=False)
        self.norm = UBN(9)


def subclasses(kind):
    return [found for child in kind.__subclasses__() for found in (child, *subclasses(child))]


CASES = subclasses(Block)


def leaves(output):
    if isinstance(output, types.SimpleNamespace):
        output = vars(output)
    return torch.utils._pytree.tree_flatten(output)[0]


@pytest.mark.parametrize('how', ['read', 'watched'])
@pytest.mark.parametrize('case', CASES, ids=lambda case: case.__name__)
def test_certain_or_left(case, how):
    model = trained(case()).double()
    x = torch.randn(2, 3, 8, 8).double()
    prepared = prepare_for_inference(model, (x,) if how == 'watched' else None)
    with torch.no_grad():
        for actual, expected in zip(leaves(prepared(x)), leaves(model(x))):
            assert difference(actual, expected) < 1e-13
    (layer, *_) = prepared.inference_report
    assert layer.reason == (case.reason or '')
    assert bool(layer.convolution) == (case.reason is None)


class Branching(Block):
    """torch.fx cannot read it."""

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) if x.sum() > 0 else self.norm(y).relu()


def test_a_tensor_made_in_forward_can_be_read():
    model = trained(Constant())
    assert list(read_forward(model, [model.norm], Aside(model)).inputs) == [id(model.norm)]


class KeepsItsMean(Block):
    def forward(self, x):
        y = self.norm(self.conv(x))
        self.mean = y.mean()
        return y


def test_what_forward_keeps_is_nothing_of_the_reading(tmp_path):
    """It could not be saved."""
    prepared = prepare_for_inference(trained(KeepsItsMean()))
    assert prepared.inference_report[0].convolution == 'conv'
    assert 'mean' not in vars(prepared)
    torch.save(prepared, tmp_path / 'prepared.pt')


def test_watches_a_run_where_forward_cannot_be_read():
    model = trained(Branching())
    state = torch.random.get_rng_state()
    prepared = prepare_for_inference(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert prepared.inference_report[0].convolution == 'conv'
    assert not prepared.conv._forward_hooks
    for x in (torch.rand(1, 3, 6, 6), -torch.rand(1, 3, 6, 6)):
        assert difference(prepared(x), model(x)) < 2e-6


def test_a_default_device_is_not_that_of_the_model():
    """torch.set_default_device names one for new tensors."""
    model = trained(nn.Sequential(Branching(), nn.ReLU()))
    alone = nn.Sequential(nn.ReLU(), mmubn.RBN(8)).eval()
    with torch.device('meta'):
        prepared = prepare_for_inference(model)
        (layer,) = prepare_for_inference(alone).inference_report
    assert prepared.inference_report[0].convolution == '0.conv'
    assert layer.left == 'BatchNorm2d'


class Demanding(Branching):
    """Neither readable nor willing to take an image of noise."""

    def forward(self, x):
        if x.shape[-1] != 6:
            raise RuntimeError('six columns')
        return super().forward(x)


def test_says_that_it_needs_an_example():
    model = trained(Demanding())
    x = torch.rand(1, 3, 6, 6)
    (layer,) = prepare_for_inference(model).inference_report
    assert layer.reason == 'the order of the layers is not known: pass example_inputs'
    prepared = prepare_for_inference(model, (x,))
    assert prepared.inference_report[0].convolution == 'conv'
    assert difference(prepared(x), model(x)) < 2e-6
    with pytest.raises(RuntimeError, match='six columns'):
        prepare_for_inference(model, (x[..., :5],))


class Detector(nn.Module):
    """Like OpenMMLab's: forward wants more than images, extract_feat does not."""

    def __init__(self):
        super().__init__()
        self.backbone = Branching()
        self.head = Block()

    def extract_feat(self, images):
        return self.backbone(images)

    def forward(self, images, samples):
        return [self.head(image[None]) for image in images[: len(samples)]]


def test_extract_feat_stands_for_a_detector():
    report = prepare_for_inference(trained(Detector())).inference_report
    assert [layer.convolution for layer in report] == ['backbone.conv', '']
    assert report[1].reason == 'it is not called'


class HeadThatReads(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.held = [backbone]

    def forward(self, x):
        return x * self.held[0].conv.weight.mean()


def test_extract_feat_does_not_show_what_a_head_reads():
    model = Detector()
    model.head = HeadThatReads(model.backbone)
    model = trained(model).double()
    x = torch.rand(1, 3, 6, 6).double()
    prepared = prepare_for_inference(model)
    assert prepared.inference_report[0].reason == 'its weights are read elsewhere'
    with torch.no_grad():
        assert difference(prepared(x, [None])[0], model(x, [None])[0]) < 1e-13
        assert difference(prepared.extract_feat(x), model.extract_feat(x)) < 1e-13


class OwnExtractFeat(Branching):
    """A method of the name alone, which reads less than forward does."""

    def extract_feat(self, x):
        return self.norm(self.conv(x))

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y.abs() if x.sum() > 0 else y


def test_forward_itself_runs_where_it_can():
    model = trained(OwnExtractFeat())
    prepared = prepare_for_inference(model)
    assert prepared.inference_report[0].reason == 'its input is read elsewhere too'
    x = torch.rand(1, 3, 6, 6)
    assert difference(prepared(x), model(x)) < 2e-6


class Counting(Block):
    def build(self):
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize('inputs', [None, torch.rand(1, 3, 6, 6)], ids=['read', 'watched'])
def test_finding_leaves_the_buffers(inputs):
    model = trained(Counting())
    prepared = prepare_for_inference(model, inputs)
    assert model.calls == prepared.calls == 0
    assert prepared.inference_report[0].convolution == 'conv'


def test_activations_that_timm_fuses_are_no_hooks_of_a_user():
    """Its size lets no image of noise through."""
    norm = timm.layers.BatchNormAct2d(8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Flatten(), nn.Linear(8 * 4 * 4, 2))
    model = trained(mmubn.convert_norm(model, dict(type='UBN')))
    prepared = prepare_for_inference(model)
    assert prepared.inference_report[0].convolution == '0'
    x = torch.rand(2, 3, 6, 6)
    assert difference(prepared(x), model(x)) < 2e-6


def test_hooks_of_a_user_get_tensors():
    seen = []
    model = trained(nn.Sequential(Block(), nn.ReLU()))
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    prepared = prepare_for_inference(model)
    assert prepared.inference_report[0].convolution == '0.conv'
    assert {type(value) for value in seen} <= {torch.Tensor}
