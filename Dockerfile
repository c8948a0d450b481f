# esm2mega for GPUs, in a container that runs as a user. The default base image brings Python 3.12, torch and CUDA; torch is
# within the bounds of setup.py, and new enough for torch.nn.attention.varlen, the packed attention that needs no further
# package:
#
#   docker build -t esm2mega .
#
# With Transformer Engine and apex: take the GPU vendor's PyTorch image as base. Its torch is kept as it is.
#
#   docker build -t esm2mega --build-arg BASE_IMAGE=IMAGE:TAG .
#
# What runs in the container works in /work and writes its files as the user who starts it. Processes on several GPUs meet in
# shared memory, of which a container has too little by default:
#
#   docker run --rm --gpus all --ipc host --ulimit memlock=-1 --user "$(id -u):$(id -g)" --volume "$PWD:/work" esm2mega \
#     torchrun --standalone --nproc-per-node 8 -m esm2mega pretrain --config pretrain_esm2_650M run_dir=runs/650M data.train=…
#
# Without a GPU: docker/cpu.Dockerfile.

ARG BASE_IMAGE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-devel
FROM ${BASE_IMAGE}

# What is installed as torch where the base image has none, and further words for pip.
ARG TORCH=torch==2.13.0
ARG TORCH_ARGS=""
# Everything that the commands of the README need.
ARG EXTRAS=excel,finetune,logging,onnx,parquet,tape

# The base image's Python is that of its Linux distribution, which pip leaves alone unless it is told otherwise.
ENV PIP_BREAK_SYSTEM_PACKAGES=1

# The compiler is for torch.compile. Distributions keep one version of it at a time, so none can be named for long.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/esm2mega
COPY setup.py pyproject.toml README.md LICENSE ./
COPY esm2mega esm2mega
COPY conf conf
COPY examples examples

# A base image's torch is matched to its CUDA libraries: freeze it where there is one, install one where there is none.
# setup.py bounds the versions of the rest; TORCH_ARGS is several words.
# hadolint ignore=DL3013,SC2086
RUN { python -c 'import torch' 2>/dev/null || python -m pip install --no-cache-dir ${TORCH_ARGS} "${TORCH}"; } \
    && python -c 'import torch; print(f"torch=={torch.__version__}")' > /tmp/constraints.txt \
    && python -m pip install --no-cache-dir --constraint /tmp/constraints.txt ".[${EXTRAS}]" \
    && rm /tmp/constraints.txt

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

# Without PyTorch and without other processes: a check on the GPUs would take memory from a training.
HEALTHCHECK --interval=5m --timeout=30s CMD ["esm2mega", "doctor", "--quick"]
CMD ["esm2mega", "--help"]
