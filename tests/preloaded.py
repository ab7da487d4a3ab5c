"""What the fork server loads once: the libraries that the project's programs import, and nothing of the project itself.

Objects that live by then are left out of garbage collection in the forked processes, which would else visit a million
of them, and copy their memory, each time.
"""

import gc
import importlib

MODULES = [
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "omegaconf",
    "PIL.Image",
    "pyarrow.parquet",
    "pydantic",
    "rich.table",
    "safetensors.torch",
    "simplejpeg",
    "tensorboard.summary",
    "tokenizers",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "transformers.models.molmo2.modeling_molmo2",
    "transformers.models.molmo2.processing_molmo2",
    "transformers.models.molmo2.video_processing_molmo2",
    "xxhash",
]
for name in MODULES:
    importlib.import_module(name)
gc.collect()
gc.freeze()
