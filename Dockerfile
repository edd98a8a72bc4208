# dora-vl in a container, for a CPU or for NVIDIA GPUs; the current folder holds the runs:
#
#   docker build --target cpu --tag dora-vl .
#   docker run --rm -it -v "$PWD:/work" --user "$(id -u):$(id -g)" dora-vl quickstart
#   docker build --target cuda --tag dora-vl:cuda .
#   docker run --rm -it --gpus all --ipc host -v "$PWD:/work" --user "$(id -u):$(id -g)" dora-vl:cuda doctor
#
# pip's own variables are build arguments: PIP_INDEX_URL names another index, such as one with torch for CPUs alone.

FROM python:3.12-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY dora_vl dora_vl
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim-bookworm AS cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# g++: DeepSpeed compiles its optimizer's operators where they are first used.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /wheels /wheels
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[deepspeed,sentencepiece,serve,video,web]"
ENV HOME=/tmp/home DS_ACCELERATOR=cpu
WORKDIR /work
USER 1000:1000
ENTRYPOINT ["dora-vl"]
CMD ["--help"]

# -devel: DeepSpeed's operators are compiled with nvcc. torch brings its own CUDA libraries.
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04 AS cuda
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/dora-vl
ENV PATH=/opt/dora-vl/bin:$PATH HOME=/tmp/home
COPY --from=wheel /wheels /wheels
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[deepspeed,quantised,sentencepiece,serve,video,web]"
WORKDIR /work
USER 1000:1000
ENTRYPOINT ["dora-vl"]
CMD ["--help"]
