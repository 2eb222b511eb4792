# The image of docs/torchx.md, for CPU clusters. `packaging/check_dockerfile.sh` runs its RUN lines without Docker.
FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
COPY . /opt/source
WORKDIR /opt/source
# The package itself not as a link to its sources: a wheel holds the CPU kernels for every x86-64 processor, so
# that no node compiles. Where it has none (arm64), the first RUN of the next block compiles them for this machine.
RUN python3 -m venv /opt/venv \
    && sed 's/^-e //' requirements-cpu.txt > /tmp/requirements.txt \
    && pip install --no-cache-dir --requirement /tmp/requirements.txt \
    && pip check \
    && rm -rf build /tmp/requirements.txt
# The jobs need no file of the repository; they run as a user who may write nothing of the image.
WORKDIR /work
ENV TORCHREC_SID_CACHE=/opt/kernels
RUN python -c "from torchrec_sid.side.kernels.compiler import load_library; assert load_library().library"
RUN useradd --uid 1000 trainer
USER trainer
RUN torchrec-sid doctor
