#include "support.hpp"

#include <sys/stat.h>
#include <sys/syscall.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>

namespace pgsidecar::proxy::test {

long g_send_budget = -1;
std::atomic<int> g_sends = 0;

Identity Certificates::make(const Wish& wish, const Identity* issuer) {
  Identity identity;
  identity.key.reset(wish.rsa ? EVP_RSA_gen(2048) : EVP_EC_gen("P-256"));
  identity.certificate.reset(X509_new());
  X509* c = identity.certificate.get();
  X509_set_version(c, 2);
  ASN1_INTEGER_set(X509_get_serialNumber(c), serial_++);
  X509_gmtime_adj(X509_getm_notBefore(c), wish.from_days * 86400);
  X509_gmtime_adj(X509_getm_notAfter(c), wish.to_days * 86400);
  X509_set_pubkey(c, identity.key.get());
  X509_NAME* name = X509_get_subject_name(c);
  X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, reinterpret_cast<const unsigned char*>(wish.common_name.data()),
                             static_cast<int>(wish.common_name.size()), -1, 0);
  X509* const signer = issuer ? issuer->certificate.get() : c;
  X509_set_issuer_name(c, X509_get_subject_name(signer));
  const auto extend = [&](int nid, const std::string& value) {
    X509V3_CTX context;
    X509V3_set_ctx(&context, signer, c, nullptr, nullptr, 0);
    X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, &context, nid, value.c_str());
    X509_add_ext(c, extension, -1);
    X509_EXTENSION_free(extension);
  };
  extend(NID_basic_constraints, wish.authority ? "critical,CA:TRUE" : "critical,CA:FALSE");
  if (!wish.names.empty()) extend(NID_subject_alt_name, wish.names);
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  EVP_PKEY_CTX* key_context = nullptr;
  EVP_DigestSignInit(context, &key_context, wish.digest, nullptr, issuer ? issuer->key.get() : identity.key.get());
  if (wish.pss) EVP_PKEY_CTX_set_rsa_padding(key_context, RSA_PKCS1_PSS_PADDING);
  if (X509_sign_ctx(c, context) <= 0) throw std::runtime_error("X509_sign_ctx");
  EVP_MD_CTX_free(context);

  const std::string base = directory_ + "/" + std::to_string(serial_);
  identity.certificate_file = base + ".crt";
  identity.key_file = base + ".key";
  std::FILE* file = std::fopen(identity.certificate_file.c_str(), "w");
  PEM_write_X509(file, c);
  std::fclose(file);
  file = std::fopen(identity.key_file.c_str(), "w");
  ::fchmod(::fileno(file), 0600);
  PEM_write_PrivateKey(file, identity.key.get(), nullptr, nullptr, 0, nullptr, nullptr);
  std::fclose(file);
  return identity;
}

}  // namespace pgsidecar::proxy::test

// In place of the C library's: take what the budget allows, then say that the buffer is full.
extern "C" ssize_t send(int fd, const void* bytes, std::size_t size, int flags) {
  iovec vector{const_cast<void*>(bytes), size};
  msghdr message{};
  message.msg_iov = &vector;
  message.msg_iovlen = 1;
  return ::sendmsg(fd, &message, flags);
}

extern "C" ssize_t sendmsg(int fd, const msghdr* message, int flags) {
  long& budget = pgsidecar::proxy::test::g_send_budget;
  ++pgsidecar::proxy::test::g_sends;
  if (budget < 0) return ::syscall(SYS_sendmsg, fd, message, flags);
  if (budget == 0) {
    errno = EAGAIN;
    return -1;
  }
  std::vector<iovec> taken;
  for (std::size_t i = 0; i < message->msg_iovlen && budget > 0; ++i) {
    const std::size_t n = std::min(message->msg_iov[i].iov_len, static_cast<std::size_t>(budget));
    taken.push_back({message->msg_iov[i].iov_base, n});
    budget -= static_cast<long>(n);
  }
  msghdr part = *message;
  part.msg_iov = taken.data();
  part.msg_iovlen = taken.size();
  return ::syscall(SYS_sendmsg, fd, &part, flags);
}
