# syntax=docker/dockerfile:1
# Targets: cpu and cuda (the server), edge (the client).
#
#   docker build --target cpu --build-arg TORCH_INDEX=... -t fl-llama:cpu .
#   docker run -p 8700:8700 fl-llama:cpu ORG/NAME
#   docker build --target cuda -t fl-llama:cuda .
#   docker run --gpus all -p 8700:8700 -v models:/data fl-llama:cuda ORG/NAME
#
# TORCH_INDEX is the address of PyTorch's CPU wheel index (see pytorch.org/get-started) for images without CUDA.

ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON_VERSION}-slim AS base
ENV PYTHONUNBUFFERED=1 HF_HOME=/data/huggingface XDG_CACHE_HOME=/data/cache XDG_STATE_HOME=/data/state
# Downloads, the edge's secret and the pins live on the volume.
RUN useradd --create-home --uid 10001 fl-llama && install -d -o fl-llama -g fl-llama /data
VOLUME /data
WORKDIR /home/fl-llama
COPY --from=wheel /wheels /wheels
COPY constraints.txt /wheels/

FROM base AS server-base
ENV FL_LLAMA_SERVER_HOST=0.0.0.0
EXPOSE 8700
HEALTHCHECK --interval=15s --timeout=5s --start-period=300s --retries=3 CMD ["python", "-c", \
  "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8700/readyz', timeout=4)"]
ENTRYPOINT ["split-server"]
CMD ["demo"]

FROM server-base AS cpu
ARG TORCH_INDEX
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c /wheels/constraints.txt \
  "$(echo /wheels/*.whl)[server]"
USER fl-llama

FROM server-base AS cuda
# Triton compiles its launcher with the C compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir -c /wheels/constraints.txt "$(echo /wheels/*.whl)[server]"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER fl-llama

FROM base AS edge
ARG TORCH_INDEX
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c /wheels/constraints.txt \
  "$(echo /wheels/*.whl)[gateway]"
USER fl-llama
ENTRYPOINT ["edge-client"]
CMD ["--help"]
