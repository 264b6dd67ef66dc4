"""Does a vision transformer that is read from a folder give the features of the library that wrote it? Random weights and small measures;
each kind of folder is written by the package `transformers`, opened by `covid_cxr.model.backbones`, and both get the same grey images.

    pip install transformers
    python benchmarks/vit_twin.py          about half a minute

The result replaces benchmarks/results/vit_twin.json.
"""
import argparse, json, tempfile
from pathlib import Path
from record import RESULTS, about, machine, write_result
import torch
import transformers
from covid_cxr.model.backbones import load_encoder
from covid_cxr.model.settings import MEAN, STD

SMALL = dict(image_size=56, patch_size=14, hidden_size=48, num_hidden_layers=3, num_attention_heads=4)
KINDS = {'Dinov2Model': transformers.Dinov2Config(**SMALL, mlp_ratio=4),
         'Dinov2WithRegistersModel': transformers.Dinov2WithRegistersConfig(**SMALL, mlp_ratio=4, num_register_tokens=4),
         'ViTModel': transformers.ViTConfig(**SMALL, intermediate_size=96)}
GREY_MEAN, GREY_STD = .5307, .2583


def largest_difference(name, config, folder):
    "Largest difference of the feature maps on four grey images, and the size of the features"
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(config).eval()
    for p in theirs.parameters(): torch.nn.init.normal_(p, std=.3)
    theirs.save_pretrained(folder)
    (Path(folder) / 'preprocessor_config.json').write_text(json.dumps(dict(image_mean=[GREY_MEAN] * 3, image_std=[GREY_STD] * 3)))
    ours = load_encoder(folder, size=56, on_doubt='off').body.eval()
    pixels = torch.rand(4, 1, 56, 56)
    with torch.no_grad():
        tokens = theirs(((pixels - GREY_MEAN) / GREY_STD).expand(-1, 3, -1, -1)).last_hidden_state
        maps = ours((pixels - MEAN) / STD)
    n = maps.shape[2] * maps.shape[3]
    wanted = tokens[:, -n:].transpose(1, 2).reshape(maps.shape)
    return float((maps - wanted).abs().max()), float(wanted.abs().mean())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', default=RESULTS / 'vit_twin.json')
    a = p.parse_args()
    rows = []
    for name, config in KINDS.items():
        with tempfile.TemporaryDirectory() as folder: gap, size = largest_difference(name, config, folder)
        rows.append(dict(model=name, largest_difference=gap, mean_size=round(size, 4)))
        print(rows[-1])
    write_result(a.out, dict(about(), machine=machine(), transformers=transformers.__version__, folders=rows))


if __name__ == '__main__': main()
