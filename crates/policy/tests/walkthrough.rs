//! A tour of the crate: requests find their replicas.

use pomona_policy::Router;
use pomona_types::{TenantId, TokenId};

#[test]
fn requests_find_their_replicas() {
    let mut router = Router::new(2);
    let everybody = |_| true;
    let prompt: Vec<TokenId> = (0..64).collect();

    // Nobody knows anything yet: they take turns.
    let first = router.route(TenantId(0), &prompt, 16, everybody).expect("there are replicas");
    let other = router.route(TenantId(0), &[7; 64], 16, everybody).expect("there are replicas");
    assert_ne!(first.replica, other.replica);

    // When both are done, the same beginning goes where it is remembered.
    router.done(first);
    router.done(other);
    let again = router.route(TenantId(0), &prompt, 16, everybody).expect("there are replicas");
    assert_eq!((again.replica, again.remembered), (first.replica, 64));

    // Unless that replica is not there any more.
    let closed = |replica: usize| replica != first.replica;
    let elsewhere = router.route(TenantId(0), &prompt, 16, closed).expect("one is open");
    assert_eq!(elsewhere.replica, other.replica);
}
