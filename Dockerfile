# Built in one stage; the image has the binary, the libraries it needs, CA certificates, and no shell.
# The same base and packages make the same image: --build-arg BASE=debian@sha256:... pins the one, a snapshot mirror in it the other;
# --build-arg SOURCE_DATE_EPOCH and --output type=image,rewrite-timestamp=true (BuildKit) the times.
# integration/image.sh makes it of the same parts without Docker.
ARG BASE=debian:bookworm-slim
FROM $BASE AS build
RUN apt-get update && apt-get install -y --no-install-recommends \
      ca-certificates cmake g++ libboost1.81-dev libidn-dev libjs-chart.js libspdlog-dev libssl-dev libyaml-cpp-dev ninja-build python3 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
ARG COMMIT=
COPY . .
RUN cmake -G Ninja -S . -B /build -DCMAKE_BUILD_TYPE=Release -DPGSIDECAR_TESTS=OFF -DPGSIDECAR_COMMIT="$COMMIT" \
    && cmake --build /build --target pgsidecar
ARG SOURCE_DATE_EPOCH=0
RUN conf/image/rootfs.sh /build/pgsidecar /root-fs

FROM scratch
ARG COMMIT=
LABEL org.opencontainers.image.title="pgsidecar" \
      org.opencontainers.image.description="A PostgreSQL connection pooler that runs beside its application" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="$COMMIT"
COPY --from=build /root-fs/ /
USER 65532:65532
EXPOSE 6432 5000
HEALTHCHECK --interval=10s --timeout=6s --start-period=5s CMD ["/usr/local/bin/pgsidecar", "healthcheck"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/pgsidecar"]
