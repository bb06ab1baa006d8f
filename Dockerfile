# The CPU image: the demo, the student side, evaluation. On a CUDA machine start from an image that brings torch for it.
#   docker build -t codedistill .
#   docker run --rm -v "$PWD/artifacts:/codedistill/artifacts" codedistill make all PROFILE=demo
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends make git && rm -rf /var/lib/apt/lists/*
WORKDIR /codedistill
COPY pyproject.toml constraints.txt Makefile README.md LICENSE ./
COPY shared shared
COPY data data
COPY stage1_teacher stage1_teacher
COPY stage2_student stage2_student
COPY tests tests
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_NO_CACHE_DIR=1
RUN make setup
ENV PATH=/codedistill/.venv/bin:$PATH
CMD ["codedistill", "--help"]
