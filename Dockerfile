# Training image: CUDA, the project installed, no data. Data and runs live on a volume mounted at /data.
#   docker build -t nanomolmo2 .
#   docker run --gpus all --shm-size 16g -v $PWD/data:/data nanomolmo2 \
#       deepspeed molmo2/train.py --recipe recipes/demo/stage1.yaml
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# g++ and python3-dev: DeepSpeed and Triton compile small operators on first use.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++=4:13.* git=1:2.* make=4.* python3-dev=3.12.* python3-venv=3.12.* \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 trainer && mkdir /app /data && chown trainer:trainer /app /data
USER 10001
WORKDIR /app

COPY --chown=trainer:trainer setup.cfg pyproject.toml requirements.lock Makefile README.md LICENSE ./
COPY --chown=trainer:trainer shards shards
COPY --chown=trainer:trainer molmo2 molmo2
RUN make install

COPY --chown=trainer:trainer tools tools
COPY --chown=trainer:trainer recipes recipes

ENV PATH=/app/.venv/bin:$PATH MOLMO2_DATA=/data PYTHONUNBUFFERED=1
VOLUME /data
CMD ["python", "molmo2/train.py", "--help"]
