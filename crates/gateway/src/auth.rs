//! API keys: who may come in, and whose cache they share.

use axum::http::{HeaderMap, header};
use pomona_types::TenantId;
use sha2::{Digest, Sha256};

use crate::error::ApiError;

/// The keys that open the API, as digests: comparing those takes the same time for every key that
/// a caller may present, and says nothing about lengths.
pub(crate) struct Keys {
    digests: Vec<[u8; 32]>,
}

impl Keys {
    /// Takes over the configured keys.
    pub(crate) fn new(keys: &[String]) -> Keys {
        Keys { digests: keys.iter().map(|key| digest(key.as_bytes())).collect() }
    }

    /// The tenant of the key in `Authorization: Bearer KEY`. Without configured keys everyone is
    /// tenant 0.
    pub(crate) fn check(&self, headers: &HeaderMap) -> Result<TenantId, ApiError> {
        if self.digests.is_empty() {
            return Ok(TenantId(0));
        }
        let value = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
        let presented = digest(value.and_then(bearer).ok_or(ApiError::Unauthorized)?);
        // No early exit: every key is compared, each in full.
        let mut found = None;
        for (index, known) in self.digests.iter().enumerate() {
            let difference = known.iter().zip(&presented).fold(0, |all, (a, b)| all | (a ^ b));
            if std::hint::black_box(difference) == 0 {
                found = Some(TenantId(index as u64 + 1));
            }
        }
        found.ok_or(ApiError::Unauthorized)
    }
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii())
}

fn digest(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(keys: &[&str], header: Option<&str>) -> Option<u64> {
        let keys = Keys::new(&keys.iter().map(|key| key.to_string()).collect::<Vec<_>>());
        let mut headers = HeaderMap::new();
        if let Some(header) = header {
            headers.insert("authorization", header.parse().unwrap());
        }
        keys.check(&headers).ok().map(|tenant| tenant.0)
    }

    #[test]
    fn without_keys_everyone_may_come_in() {
        assert_eq!(check(&[], None), Some(0));
        assert_eq!(check(&[], Some("Bearer whatever")), Some(0));
    }

    #[test]
    fn each_key_is_a_tenant_of_its_own() {
        assert_eq!(check(&["a", "b"], Some("Bearer a")), Some(1));
        assert_eq!(check(&["a", "b"], Some("bearer b")), Some(2));
    }

    #[test]
    fn anything_else_stays_outside() {
        for header in ["Bearer c", "Bearer ", "Basic a", "a", "Bearera", "Bearer ab", ""] {
            assert_eq!(check(&["a", "b"], Some(header)), None, "{header}");
        }
        assert_eq!(check(&["a"], None), None);
    }
}
