# esm2mega without a GPU, in a container that runs as a user:
#
#   docker build -f docker/cpu.Dockerfile -t esm2mega:cpu --build-arg TORCH_ARGS='--index-url URL' .
#
# URL is the index of CPU builds on the install page of PyTorch; without it, pip may take a build with gigabytes of CUDA
# libraries. What runs in the container works in /work and writes its files as the user who starts it:
#
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" esm2mega:cpu esm2mega quickstart
#
# `make image-root` executes this file without a container engine, see docs/installation.md.

# A replacement brings Python 3.10 or newer as `python`, with pip, and apt-get.
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

ARG TORCH=torch==2.13.0
ARG TORCH_ARGS=""
# Everything that the commands of the README need.
ARG EXTRAS=excel,finetune,logging,onnx,parquet,tape

# The compiler is for torch.compile. Debian keeps one version of it at a time, so none can be named for long.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# Before the code is copied, so that a change of the code does not install torch again. TORCH_ARGS is several words.
# hadolint ignore=DL3013,SC2086
RUN python -m pip install --no-cache-dir ${TORCH_ARGS} "${TORCH}"

WORKDIR /opt/esm2mega
COPY setup.py pyproject.toml README.md LICENSE ./
COPY esm2mega esm2mega
COPY conf conf
COPY examples examples

# setup.py bounds the versions of what is installed here.
# hadolint ignore=DL3013
RUN python -m pip install --no-cache-dir ".[${EXTRAS}]"

# With `--user NUMBER` anyone may run here: home and work directory are writable for all, as /tmp is, and USER stands in
# for the name that such a number does not have, which torch.compile asks for.
ENV HOME=/home/esm2mega \
    USER=esm2mega
RUN useradd --uid 10001 --create-home --home-dir "${HOME}" esm2mega \
    && mkdir /work \
    && chmod 1777 "${HOME}" /work
USER 10001
WORKDIR /work

# The proof that the image works: the CPU example, shortened, with two processes.
RUN STEPS=4 OUT=/tmp/example bash /opt/esm2mega/examples/pretrain_cpu.sh && rm -rf /tmp/example

# Without PyTorch and without other processes: some seconds of one core would disturb a training.
HEALTHCHECK --interval=5m --timeout=30s CMD ["esm2mega", "doctor", "--quick"]
CMD ["esm2mega", "--help"]
