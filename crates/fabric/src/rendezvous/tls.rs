//! Mutual TLS 1.3 without an authority: both sides show a certificate that they made a moment ago.
//!
//! TLS itself then proves that each has the key of its certificate; that the key belongs to one who
//! may join is shown by the proofs of the token, which are bound to the session's exporter.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    ClientConfig, ClientConnection, Connection, DigitallySignedStruct, DistinguishedName, Error,
    PeerIncompatible, ServerConfig, ServerConnection, SignatureScheme, version,
};

/// The name in certificates, which nobody looks at.
const NAME: &str = "pomona";
/// The application's protocol (RFC 7301), lest another server of TLS is taken for a leader.
const APPLICATION: &[u8] = b"pomona-fabric";
/// Label of the exporter that proofs are bound to (RFC 8446, 7.5).
const EXPORTER: &[u8] = b"EXPORTER-Pomona-Join";

/// The leader's side of a session.
pub(crate) fn server() -> Result<Connection, Error> {
    let provider = Arc::new(ring::default_provider());
    let (certificate, key) = certificate()?;
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&version::TLS13])?
        .with_client_cert_verifier(Arc::new(OwnCertificate(provider)))
        .with_single_cert(vec![certificate], key)?;
    config.alpn_protocols = vec![APPLICATION.to_vec()];
    config.send_tls13_tickets = 0;
    Ok(ServerConnection::new(Arc::new(config))?.into())
}

/// A node's side.
pub(crate) fn client() -> Result<Connection, Error> {
    let provider = Arc::new(ring::default_provider());
    let (certificate, key) = certificate()?;
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(OwnCertificate(provider)))
        .with_client_auth_cert(vec![certificate], key)?;
    config.alpn_protocols = vec![APPLICATION.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    let name = ServerName::try_from(NAME).expect("it is a name");
    Ok(ClientConnection::new(Arc::new(config), name)?.into())
}

/// What only the two ends of a session know. None if the other side did not speak our protocol.
pub(crate) fn exporter(session: &Connection) -> Option<[u8; 32]> {
    if session.alpn_protocol() != Some(APPLICATION) {
        return None;
    }
    let bytes = match session {
        Connection::Client(session) => session.export_keying_material([0; 32], EXPORTER, None),
        Connection::Server(session) => session.export_keying_material([0; 32], EXPORTER, None),
    };
    bytes.ok()
}

fn certificate() -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), Error> {
    let made = rcgen::generate_simple_self_signed(vec![NAME.to_owned()])
        .map_err(|error| Error::General(format!("cannot make a certificate: {error}")))?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    Ok((made.cert.der().clone(), key.into()))
}

/// Takes any certificate whose key signs the handshake.
#[derive(Debug)]
struct OwnCertificate(Arc<CryptoProvider>);

impl OwnCertificate {
    fn verify(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Versions before 1.3 are not offered, so this is never asked.
fn refuse_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(PeerIncompatible::ServerDoesNotSupportTls12Or13.into())
}

impl ServerCertVerifier for OwnCertificate {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for OwnCertificate {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}
