# nemo_minitron on top of an NGC NeMo container, whose torch, NeMo, Megatron-Core, Transformer Engine and Apex stay as
# they are: nothing is installed with its dependencies. docs/containers.md has more.
#
#   docker build -t nemo-minitron .
#   docker run --rm --gpus all --ipc host -v "$PWD:/workspace" nemo-minitron nemo-minitron run RECIPE --nproc 8
#
# The mounted folder must be writable for user 10001; otherwise add --user "$(id -u):$(id -g)".
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:25.11
FROM ${BASE_IMAGE}

COPY . /opt/nemo_minitron
# Small, and not in every release of the container.
RUN python -m pip install --no-cache-dir --no-deps --constraint /opt/nemo_minitron/constraints.txt \
        annotated-doc gguf mwparserfromhell shellingham typer \
    && python -m pip install --no-cache-dir --no-deps /opt/nemo_minitron

RUN useradd --create-home --uid 10001 minitron \
    && mkdir -p /workspace \
    && chown minitron /workspace
USER minitron
WORKDIR /workspace

# The image is no good without a part that stages need, or with a Megatron-Core that they do not know. There is no GPU
# while it is built, and none is asked for.
RUN nemo-minitron doctor --strict \
    && python -c "from nemo_minitron.megatron.cpu import check_version; check_version()"

CMD ["nemo-minitron", "--help"]
