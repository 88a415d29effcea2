//! TLS towards a server: which certificates it trusts, and a TCP stream below it that records when its bytes arrived.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use rustls_platform_verifier::BuilderVerifierExt as _;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::{self, ClientConfig, DigitallySignedStruct, SignatureScheme};

use super::rx_timestamp::TimestampingReader;

/// The trusted certificates of a client.
#[derive(Clone)]
pub struct Tls(TlsConnector);

impl Tls {
    /// Trusts the system's certificates (`SSL_CERT_FILE` and `SSL_CERT_DIR` name others), or any certificate if
    /// `is_insecure`.
    ///
    /// # Errors
    /// When the system has no trusted certificates.
    pub fn new(is_insecure: bool) -> Result<Self, rustls::Error> {
        let provider = Arc::new(ring::default_provider());
        let builder =
            ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
        let mut config = if is_insecure {
            let verifier = Arc::new(AcceptAnyCertificate(provider));
            let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
            builder.with_no_client_auth()
        } else {
            builder.with_platform_verifier()?.with_no_client_auth()
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(TlsConnector::from(Arc::new(config))))
    }

    /// Performs the handshake with the server of this name over a connection.
    pub(super) async fn over(&self, below: TimedTcpStream, host: &str) -> io::Result<TlsStream<TimedTcpStream>> {
        let name = ServerName::try_from(host.to_owned());
        let name = name.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        self.0.connect(name, below).await
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Tls")
    }
}

/// The TCP connection below a TLS one.
#[derive(Debug)]
pub(super) struct TimedTcpStream {
    pub(super) stream: TcpStream,
    pub(super) reader: Option<TimestampingReader>,
    /// Bytes that the reader has read and TLS has not taken yet.
    held: BytesMut,
}

impl TimedTcpStream {
    pub(super) fn new(stream: TcpStream, reader: Option<TimestampingReader>) -> Self {
        Self {
            stream,
            reader,
            held: BytesMut::new(),
        }
    }
}

impl AsyncRead for TimedTcpStream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, room: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { stream, reader, held } = self.get_mut();
        let Some(reader) = reader else {
            return Pin::new(stream).poll_read(context, room);
        };
        if held.is_empty() {
            ready!(reader.poll_read(stream, held, context))?;
        }
        let count = held.len().min(room.remaining());
        room.put_slice(&held[..count]);
        held.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TimedTcpStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Accepts any certificate whose holder has its key.
#[derive(Debug)]
struct AcceptAnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
