"""Plain diffusers in one process, nothing of drumline: `one_process_sdxl.py MODEL OUT.npy JSON SEED...`."""

import json
import sys

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

model, out, request, *seeds = sys.argv[1:]
pipeline = StableDiffusionXLPipeline.from_pretrained(model)
pipeline.set_progress_bar_config(disable=True)
images = [
    pipeline(**json.loads(request), generator=torch.Generator().manual_seed(int(seed)), output_type="pt").images[0]
    for seed in seeds
]
np.save(out, torch.stack(images).numpy())
