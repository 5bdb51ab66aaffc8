# nemo_minitron on top of an NGC NeMo container, whose torch, NeMo, Megatron-Core, Transformer Engine and Apex stay as
# they are: nothing is installed with its dependencies.
#
#   docker build -t nemo-minitron .
#   docker run --rm --gpus all --ipc host -v "$PWD:/workspace" nemo-minitron nemo-minitron run RECIPE --nproc 8
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:25.07
FROM ${BASE_IMAGE}

COPY . /opt/nemo_minitron
# Pure Python, and not in every release of the container.
RUN pip install --no-cache-dir --no-deps --constraint /opt/nemo_minitron/constraints.txt \
        gguf mwparserfromhell shellingham typer \
    && pip install --no-cache-dir --no-deps /opt/nemo_minitron

RUN useradd --create-home --uid 10001 minitron \
    && mkdir -p /workspace \
    && chown minitron /workspace
USER minitron
WORKDIR /workspace

# The image is no good if this does not import, so let the build say so.
RUN nemo-minitron --version \
    && nemo-minitron ls \
    && python -c "import nemo_minitron.stages.distill, nemo_minitron.stages.export"

CMD ["nemo-minitron", "--help"]
