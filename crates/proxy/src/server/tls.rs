//! TLS towards clients: the certificate and the key of a proxy, read and checked before it serves.
//!
//! This module knows files and TLS, but no connection. The key is never printed.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use tokio_rustls::rustls::{self, ServerConfig, crypto::ring};
use webpki::{EndEntityCert, KeyUsage};

/// Why a certificate or a key cannot be used. Every variant names the field and the file.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file that cannot be read, or that lacks the certificate or key.
    #[error("`{field}`: cannot use `{}`", path.display())]
    File {
        /// `tls_cert` or `tls_key`.
        field: &'static str,
        /// The path of the file.
        path: PathBuf,
        /// The error of the PEM reader.
        source: pem::Error,
    },
    /// The key belongs to another certificate.
    #[error("`tls_key`: `{}` is not the key of the certificate in `{}`", key.display(), cert.display())]
    OtherKey {
        /// The file of the certificate.
        cert: PathBuf,
        /// The file of the key.
        key: PathBuf,
    },
    /// A certificate or key in PEM that TLS cannot use.
    #[error("`tls_cert` and `tls_key`: cannot use `{}` with `{}`", cert.display(), key.display())]
    Unusable {
        /// The file of the certificate.
        cert: PathBuf,
        /// The file of the key.
        key: PathBuf,
        /// The error of the TLS library.
        source: rustls::Error,
    },
}

/// The certificate and key of the proxy. Clones are the same.
#[derive(Clone)]
pub struct Tls(Arc<ServerConfig>);

impl Tls {
    /// Reads a certificate with its chain, and its key, both in PEM.
    ///
    /// # Errors
    /// When a file cannot be read or lacks its content, or the key belongs to another certificate.
    pub fn open(cert: &Path, key: &Path) -> Result<Self, TlsError> {
        let file = |field, path: &Path| {
            let path = path.to_owned();
            move |source| TlsError::File { field, path, source }
        };
        let certificates = certificates(cert).map_err(file("tls_cert", cert))?;
        let private_key = PrivateKeyDer::from_pem_file(key).map_err(file("tls_key", key))?;
        let (cert, key) = (cert.to_owned(), key.to_owned());
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("ring knows the suites of TLS 1.2 and 1.3")
            .with_no_client_auth()
            .with_single_cert(certificates, private_key)
            .map_err(|source| match source {
                rustls::Error::InconsistentKeys(_) => TlsError::OtherKey { cert, key },
                source => TlsError::Unusable { cert, key, source },
            })?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(Arc::new(config)))
    }

    /// Performs the handshake with a client.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.0))
    }
}

/// The validity of the first certificate in a file, in seconds since 1970. `None` if it cannot be read.
pub fn validity(cert: &Path) -> Option<RangeInclusive<u64>> {
    let certificates = certificates(cert).ok()?;
    let certificate = EndEntityCert::try_from(certificates.first()?).ok()?;
    // Only the error of a verification outside the dates reveals them, and it comes before any other error.
    let verify = |seconds| {
        let time = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let verified = certificate.verify_for_usage(&[], &[], &[], time, KeyUsage::server_auth(), None, None);
        verified.err()
    };
    let Some(webpki::Error::CertNotValidYet { not_before, .. }) = verify(0) else {
        return None;
    };
    let Some(webpki::Error::CertExpired { not_after, .. }) = verify(u64::MAX) else {
        return None;
    };
    Some(not_before.as_secs()..=not_after.as_secs())
}

impl fmt::Debug for Tls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Tls")
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, pem::Error> {
    let found = CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>()?;
    if found.is_empty() {
        return Err(pem::Error::NoItemsFound);
    }
    Ok(found)
}
