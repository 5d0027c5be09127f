# robustkd with CUDA: docker build -t robustkd .
# On a machine without a GPU: docker build --build-arg BASE=ubuntu:24.04 -t robustkd .
ARG BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04
FROM ${BASE}

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY recipes recipes
COPY export export
COPY robustkd robustkd
RUN python3 -m venv /opt/robustkd \
    && /opt/robustkd/bin/pip install --no-cache-dir -c constraints.txt '.[train,report]'

ENV PATH=/opt/robustkd/bin:$PATH
RUN useradd --create-home --uid 10001 robustkd && mkdir /work && chown robustkd /work
USER robustkd
# mount a folder here to keep the runs
WORKDIR /work
ENTRYPOINT ["robustkd"]
CMD ["--help"]
