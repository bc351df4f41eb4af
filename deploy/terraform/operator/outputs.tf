output "addresses" {
  description = "Point the DNS name of the coordinators at all of them."
  value       = { for name, eip in aws_eip.parent : name => eip.public_ip }
}

output "instance_ids" {
  description = "For `aws ssm start-session --target`."
  value       = { for name, instance in aws_instance.parent : name => instance.id }
}

output "database" {
  description = "Host of PostgreSQL, and the secret with its administrator's password."
  value       = [for made in aws_db_instance.this : { host = made.address, secret = made.master_user_secret[0].secret_arn }]
}

output "role_arn" {
  description = "For the parties' key policies (`coordinator_role` of ../party-key)."
  value       = aws_iam_role.parent.arn
}

output "bucket" {
  description = "Artefacts, backups, and what several parents share."
  value       = aws_s3_bucket.this.id
}

output "ami_id" {
  description = "Amazon Linux that a new instance would start from."
  value       = local.ami_id
}
