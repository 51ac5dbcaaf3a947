//! Which servers hold which shards.
