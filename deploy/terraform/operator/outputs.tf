output "address" {
  description = "Point the DNS name of the coordinator at it."
  value       = aws_eip.parent.public_ip
}

output "instance_id" {
  description = "For `aws ssm start-session --target`."
  value       = aws_instance.parent.id
}

output "role_arn" {
  description = "For the parties' key policies (`coordinator_role` of ../party-key)."
  value       = aws_iam_role.parent.arn
}

output "bucket" {
  description = "Artefacts and backups."
  value       = aws_s3_bucket.this.id
}

output "ami_id" {
  description = "Amazon Linux that a new instance would start from."
  value       = local.ami_id
}
