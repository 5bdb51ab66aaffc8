"""Fused routing of experts: absent, so Megatron does it by itself."""

fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = fused_topk_with_score_function = None
