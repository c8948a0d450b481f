# esm2mega in a container. The default base image brings Python 3.12, torch and CUDA; torch is within the bounds of
# setup.py, and new enough (2.10) for torch.nn.attention.varlen, the packed attention that needs no further package:
#
#   docker build -t esm2mega .
#
# With Transformer Engine and apex: take the GPU vendor's PyTorch image as base (its torch is kept as it is).
#
#   docker build -t esm2mega --build-arg BASE_IMAGE=IMAGE:TAG .
#
# Without a GPU (TORCH_ARGS can name an index of CPU builds, which are far smaller than the default ones):
#
#   docker build -t esm2mega --build-arg BASE_IMAGE=python:3.11-slim --build-arg TORCH_ARGS='--index-url URL' .

ARG BASE_IMAGE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-devel
FROM ${BASE_IMAGE}

ARG TORCH=torch==2.13.0
ARG TORCH_ARGS=""
ARG EXTRAS=logging

# The base image's Python is that of its Linux distribution, which pip leaves alone unless it is told otherwise.
ENV PIP_BREAK_SYSTEM_PACKAGES=1

# gcc: torch.compile and megatron-core build small helpers when they are first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/esm2mega
COPY setup.py pyproject.toml README.md LICENSE ./
COPY esm2mega esm2mega
COPY conf conf
COPY examples examples

# A base image's torch is matched to its CUDA libraries: freeze it where there is one, install one where there is none.
RUN python -c 'import torch' 2>/dev/null || python -m pip install --no-cache-dir ${TORCH_ARGS} "${TORCH}"; \
    python -c 'import torch; print(f"torch=={torch.__version__}")' > /tmp/constraints.txt \
    && python -m pip install --no-cache-dir --constraint /tmp/constraints.txt ".[${EXTRAS}]" \
    && rm /tmp/constraints.txt

# The proof that the image works: the CPU example, shortened, with two processes.
RUN STEPS=4 OUT=/tmp/example bash examples/pretrain_cpu.sh && rm -rf /tmp/example
