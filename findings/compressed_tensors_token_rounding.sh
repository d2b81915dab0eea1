#!/usr/bin/env bash
# compressed-tensors 0.20.1 with torch 2.13.0, transformers 5.24.0; Python 3.11, CPU.
#
# Dynamic quantisation of activations "per token" (strategy "token": W8A8, FP8 dynamic) takes a
# scale for each token only where the input of a layer has three axes. Of two axes, [tokens, width],
# all tokens share one scale, without a warning: the scale is reduced over the axes other than the
# first two, of which there are none, and an empty list of axes means all of them. The same layer
# gives the same token another result as soon as a larger one stands beside it, so what a request is
# answered depends on who shares its batch. Layers of two axes are common: models that flatten
# [batch, tokens, width] before an MLP or a router do so in every layer.
#
# Output seen:
#   3 axes: 4 scales, the first token alone and in company differ by 1.19e-07
#   2 axes: 1 scales, the first token alone and in company differ by 0.611
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.1
"$place/venv/bin/python" - <<'PYTHON'
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStatus,
    initialize_module_for_quantization,
)
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

per_token = QuantizationArgs(num_bits=8, type="int", strategy="token", dynamic=True)
torch.manual_seed(0)
layer = torch.nn.Linear(16, 16)
scheme = QuantizationScheme(targets=["Linear"], input_activations=per_token)
initialize_module_for_quantization(layer, scheme, force_zero_point=False)
layer.quantization_status = QuantizationStatus.FROZEN
# The last of four tokens is a hundred times as large as the others.
tokens = torch.randn(4, 16) * torch.tensor([[1.0], [1.0], [1.0], [100.0]])
found = {}
with torch.no_grad():
    for values in (tokens[None], tokens):
        axes = values.dim()
        scales = compute_dynamic_scales_and_zp(values, per_token, layer)[0].numel()
        alone, together = layer(values[..., :1, :]), layer(values)[..., :1, :]
        found[axes] = scales, float((alone - together).abs().max())
        print(
            f"{axes} axes: {scales} scales, the first token alone and in company differ by "
            f"{found[axes][1]:.3g}"
        )
assert found[3][0] == 4 and found[3][1] < 1e-5, "of three axes each token has its scale"
assert found[2][0] == 1 and found[2][1] > 0.1, "of two axes all tokens share one"
PYTHON
