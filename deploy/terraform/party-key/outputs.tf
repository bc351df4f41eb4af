output "key_arn" {
  description = "For the agreement and for the operator's `party_keys`. Give the ARN, not an alias: an alias can be moved to another key."
  value       = aws_kms_key.party.arn
}

output "policy" {
  description = "The policy as applied: read it before anything is sealed under the key."
  value       = module.policy.json
}
