"""Decode near where the prompt was computed, as far as links and memory are free. Source: the topology scores of llm-d and Dynamo (the idea).

    cost(x) = distance(prefill instance, x) x (1 + bytes in flight on the way / bytes of this KV) + kv_weight x part of the KV memory in use with it

The distance is 0 on the instance itself, then `1 - score`: `host` on one host, `rack` in one rack, `zone` in one zone, 0 beyond. A host is `host` of
an instance; its rack and zone are its first labels: `zone/rack/host`, or `rack/host`. Prefill: as `prefix_aware`, over instances of all zones.
"""
