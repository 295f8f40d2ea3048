//! The prefix tree: which token chains have KV in which blocks.
//!
//! A node stands for 16 tokens after a certain parent node (or, at the root, for a certain
//! tenant). It is found by hash and confirmed by comparing parent, tenant and tokens, so that a
//! collision can never serve foreign KV. A node lives while it is cached in some group, has
//! children, or is the end of a request's chain; hence a node's index identifies a whole prefix
//! exactly, without trusting any hash.

use pomona_types::{BLOCK_TOKENS, TenantId, TokenId};

use super::blocks::NONE;

const TOKENS: usize = BLOCK_TOKENS as usize;

#[derive(Clone, Debug)]
struct Node {
    parent: u32,
    tenant: TenantId,
    tokens: [TokenId; TOKENS],
    /// Children, cached blocks and chains that end here.
    refs: u32,
    next_in_bucket: u32,
}

/// Nodes by index, found through hash buckets. All memory is taken once.
#[derive(Clone, Debug)]
pub(super) struct PrefixTree {
    nodes: Vec<Node>,
    free: Vec<u32>,
    buckets: Vec<u32>,
    /// By node, then group: the cached block.
    blocks: Vec<u32>,
    groups: usize,
    /// Weakens the hash in tests, so that collisions happen.
    hash_mask: u64,
}

impl PrefixTree {
    pub(super) fn new(capacity: u32, groups: usize, hash_mask: u64) -> PrefixTree {
        let node = Node {
            parent: NONE,
            tenant: TenantId(0),
            tokens: [0; TOKENS],
            refs: 0,
            next_in_bucket: NONE,
        };
        PrefixTree {
            nodes: vec![node; capacity as usize],
            free: (0..capacity).rev().collect(),
            buckets: vec![NONE; (capacity as usize).next_power_of_two()],
            blocks: vec![NONE; capacity as usize * groups],
            groups,
            hash_mask,
        }
    }

    /// The node for `tokens` (16 of them) after `parent` (`NONE` for a root).
    pub(super) fn find(&self, parent: u32, tenant: TenantId, tokens: &[TokenId]) -> Option<u32> {
        self.find_in(self.bucket(parent, tenant, tokens), parent, tenant, tokens)
    }

    fn find_in(
        &self,
        bucket: usize,
        parent: u32,
        tenant: TenantId,
        tokens: &[TokenId],
    ) -> Option<u32> {
        let mut at = self.buckets[bucket];
        while at != NONE {
            let node = &self.nodes[at as usize];
            if node.parent == parent && node.tenant == tenant && node.tokens == tokens {
                return Some(at);
            }
            at = node.next_in_bucket;
        }
        None
    }

    /// Finds or makes the node for `tokens` after `parent`; `None` when all are in use. The
    /// caller's reference moves from `parent` (if it is one) to the node: a new one holds its
    /// parent with it, whose record then need not be touched.
    pub(super) fn descend(
        &mut self,
        parent: u32,
        tenant: TenantId,
        tokens: &[TokenId],
    ) -> Option<u32> {
        let bucket = self.bucket(parent, tenant, tokens);
        if let Some(found) = self.find_in(bucket, parent, tenant, tokens) {
            self.hold(found);
            if parent != NONE {
                self.release(parent);
            }
            return Some(found);
        }
        let index = self.free.pop()?;
        let node = &mut self.nodes[index as usize];
        node.refs = 1;
        node.parent = parent;
        node.tenant = tenant;
        node.tokens.copy_from_slice(tokens);
        node.next_in_bucket = self.buckets[bucket];
        self.buckets[bucket] = index;
        Some(index)
    }

    pub(super) fn hold(&mut self, node: u32) {
        self.nodes[node as usize].refs += 1;
    }

    /// Gives a reference back; nodes that nothing needs any more go, up the chain.
    pub(super) fn release(&mut self, node: u32) {
        let mut at = node;
        while at != NONE {
            let record = &mut self.nodes[at as usize];
            assert!(record.refs > 0, "prefix node {at} released more often than held");
            record.refs -= 1;
            if record.refs > 0 {
                return;
            }
            let parent = record.parent;
            self.unlink(at);
            self.free.push(at);
            at = parent;
        }
    }

    /// The block that holds `node`'s KV for a group.
    pub(super) fn block(&self, node: u32, group: usize) -> Option<u32> {
        let block = self.blocks[node as usize * self.groups + group];
        (block != NONE).then_some(block)
    }

    /// Notes that `block` holds `node`'s KV for a group; holds the node.
    pub(super) fn set_block(&mut self, node: u32, group: usize, block: u32) {
        let entry = &mut self.blocks[node as usize * self.groups + group];
        assert_eq!(*entry, NONE, "node {node} is cached twice in group {group}");
        *entry = block;
        self.hold(node);
    }

    /// The block is about to hold something else.
    pub(super) fn clear_block(&mut self, node: u32, group: usize) {
        self.blocks[node as usize * self.groups + group] = NONE;
        self.release(node);
    }

    fn unlink(&mut self, node: u32) {
        let Node { parent, tenant, tokens, next_in_bucket, .. } = self.nodes[node as usize].clone();
        let bucket = self.bucket(parent, tenant, &tokens);
        let mut at = self.buckets[bucket];
        if at == node {
            self.buckets[bucket] = next_in_bucket;
            return;
        }
        while self.nodes[at as usize].next_in_bucket != node {
            at = self.nodes[at as usize].next_in_bucket;
        }
        self.nodes[at as usize].next_in_bucket = next_in_bucket;
    }

    fn bucket(&self, parent: u32, tenant: TenantId, tokens: &[TokenId]) -> usize {
        // Multiply and fold, as in wyhash (Wang Yi, 2019): a bucket choice, not an identity.
        let fold = |a: u64, b: u64| {
            let wide =
                u128::from(a ^ 0x9e37_79b9_7f4a_7c15) * u128::from(b ^ 0xd6e8_feb8_6659_fd93);
            (wide as u64) ^ ((wide >> 64) as u64)
        };
        let mut hash = fold(u64::from(parent), tenant.0);
        for pair in tokens.chunks_exact(2) {
            hash = fold(hash, u64::from(pair[0]) << 32 | u64::from(pair[1]));
        }
        (hash & self.hash_mask) as usize & (self.buckets.len() - 1)
    }
}
