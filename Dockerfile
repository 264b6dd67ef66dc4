# The model in the box as a page in the browser and an endpoint for programs, without torch:
#     docker build -t covid-cxr . && docker run --rm -p 127.0.0.1:8000:8000 -e COVID_CXR_TOKEN=... covid-cxr
# Without COVID_CXR_TOKEN the server makes a token and prints it. Research and teaching only, not for diagnosis.
FROM python:3.12-slim
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /app
COPY requirements-predict.txt /app/
RUN python -m pip install -r /app/requirements-predict.txt
COPY . /app/source/
RUN python -m pip install --no-deps /app/source
RUN covid-cxr checks && rm -rf /app/source
RUN useradd --create-home --uid 10001 cxr
USER cxr
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
CMD ["covid-cxr", "serve", "pneumonia-small", "--host", "0.0.0.0", "--port", "8000"]
