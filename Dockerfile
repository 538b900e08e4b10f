# syntax=docker/dockerfile:1
# An image with one row of the table of versions in docs/versions.md, and this package.
#
#   docker build -t gdpo-megatron .                            GPUs: row gpu
#   docker build -t gdpo-megatron:cpu --build-arg ROW=cpu .    no GPU: row cpu
#   docker run --rm --gpus all --ipc=host -v "$PWD:/workspace" gdpo-megatron doctor
#
# The Python packages are those of scripts/lib/requirements-image-*.txt, all of them wheels of the
# package index except what is compiled against torch. apex is not installed: Transformer Engine has
# what Megatron-Core would use of it, and the index's package of that name is something else.
# /workspace is where jobs run; the sandbox's strongest layers need user namespaces, which Docker's
# default profile refuses (docs/sandbox.md; `doctor sandbox` says what is left).

ARG ROW=gpu

# Toolkit, cuDNN and NCCL with headers, and the fabric's libraries. See the table for why this one.
FROM nvcr.io/nvidia/cuda-dl-base:26.03-cuda13.2-devel-ubuntu24.04 AS base-gpu
ENV CUDA_HOME=/usr/local/cuda
# hadolint ignore=DL3008 # the distribution's own, as they are when the image is built
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        bubblewrap build-essential ca-certificates python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

FROM python:3.11-slim-bookworm AS base-cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap ca-certificates \
    && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006 # one of the two above, whose tags are pinned
FROM base-${ROW}
ARG ROW
ARG MAX_JOBS=8
WORKDIR /opt/src

# Packages before the source: a change of it repeats only the last step.
COPY scripts/install_image.sh scripts/
COPY scripts/lib/requirements-image-*.txt scripts/lib/
COPY gdpo_megatron/platform/pins.toml gdpo_megatron/platform/
RUN bash scripts/install_image.sh "$ROW" /opt/gdpo packages
# hadolint ignore=DL3059 # minutes of compiling that a change of the list alone should repeat
RUN MAX_JOBS="$MAX_JOBS" bash scripts/install_image.sh "$ROW" /opt/gdpo compiled
COPY . .
RUN bash scripts/install_image.sh "$ROW" /opt/gdpo project

# The interpreter of the environment must not see the source: what is installed is what runs.
# hadolint ignore=DL3059
RUN useradd --create-home --home-dir /workspace --uid 10001 --shell /bin/bash gdpo
WORKDIR /workspace
USER 10001
ENV PATH=/opt/gdpo/bin:$PATH \
    PYTHONUNBUFFERED=1

# The checks that take seconds. Without its GPUs a container of the row gpu is not healthy.
HEALTHCHECK --interval=10m --timeout=2m --start-period=2m --retries=1 \
    CMD ["gdpo-megatron", "doctor", "packages", "megatron", "hardware", "machine"]
ENTRYPOINT ["gdpo-megatron"]
CMD ["doctor"]
