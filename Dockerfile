# Built in one stage; the image has the binary, the libraries it needs, CA certificates, and no shell.
FROM debian:bookworm-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends \
      ca-certificates cmake g++ libboost1.81-dev libjs-chart.js libspdlog-dev libssl-dev libyaml-cpp-dev ninja-build python3 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
ARG COMMIT=
COPY . .
RUN cmake -G Ninja -S . -B /build -DCMAKE_BUILD_TYPE=Release -DPGSIDECAR_TESTS=OFF -DPGSIDECAR_COMMIT="$COMMIT" \
    && cmake --build /build --target pgsidecar
# Its own functions keep their names, for /api/monitoring/profile/stacks: 180 KB.
RUN strip -w -K '_ZN9pgsidecar*' -K '_ZNK9pgsidecar*' -K main /build/pgsidecar
# What the dynamic linker loads, under its own paths; getaddrinfo's modules; CA certificates; a user.
RUN mkdir -p /root-fs/usr/local/bin /root-fs/etc/ssl/certs \
    && cp /build/pgsidecar /root-fs/usr/local/bin/ \
    && for file in $(ldd /build/pgsidecar | grep -o '/[^ ]*') $(ls /lib/*-linux-gnu/libnss_dns.so.2 /lib/*-linux-gnu/libnss_files.so.2); do \
         mkdir -p "/root-fs$(dirname "$file")" && cp -L "$file" "/root-fs$file"; done \
    && cp -L /etc/ssl/certs/ca-certificates.crt /root-fs/etc/ssl/certs/ \
    && mkdir -p /root-fs/usr/lib/ssl \
    && ln -s /etc/ssl/certs/ca-certificates.crt /root-fs/usr/lib/ssl/cert.pem \
    && ln -s /etc/ssl/certs /root-fs/usr/lib/ssl/certs \
    && echo 'pgsidecar:x:65532:65532::/:/nonexistent' > /root-fs/etc/passwd \
    && echo 'pgsidecar:x:65532:' > /root-fs/etc/group \
    && echo 'hosts: files dns' > /root-fs/etc/nsswitch.conf

FROM scratch
LABEL org.opencontainers.image.title="pgsidecar" \
      org.opencontainers.image.description="A PostgreSQL connection pooler that runs beside its application"
COPY --from=build /root-fs/ /
USER 65532:65532
EXPOSE 6432 5000
HEALTHCHECK --interval=10s --timeout=6s CMD ["/usr/local/bin/pgsidecar", "healthcheck"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/pgsidecar"]
