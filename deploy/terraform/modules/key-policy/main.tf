# The policy of a party's key as a value. No provider: what it yields can be checked without an account.

terraform {
  required_version = ">= 1.5"
}

variable "accepted" {
  description = "Images that may decrypt: PCR0, 1, 2 of the image and PCR16 of the agreement version, 96 hex digits each; until: RFC 3339 time or null."
  type = list(object({
    pcr0  = string
    pcr1  = string
    pcr2  = string
    pcr16 = string
    until = optional(string)
  }))

  validation {
    condition     = length(var.accepted) > 0
    error_message = "accepted: a key that no enclave may use helps nobody; name at least one measurement."
  }
  validation {
    condition = alltrue([
      for a in var.accepted : alltrue([
        for pcr in [a.pcr0, a.pcr1, a.pcr2, a.pcr16] : can(regex("^[0-9a-fA-F]{96}$", pcr)) && !can(regex("^0+$", pcr))
      ])
    ])
    error_message = "accepted: each PCR has 96 hex digits and is not zero: a zero PCR0 would admit every enclave in debug mode."
  }
  validation {
    condition     = alltrue([for a in var.accepted : a.until == null || can(timecmp(coalesce(a.until, "-"), "2000-01-01T00:00:00Z"))])
    error_message = "accepted: until is a time such as 2027-06-30T00:00:00Z."
  }
}

variable "coordinator_role" {
  description = "ARN of the role under which the coordinator calls KMS: the only principal that may ask for a decryption."
  type        = string

  validation {
    condition     = can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:role/[A-Za-z0-9+=,.@_/-]+$", var.coordinator_role))
    error_message = "coordinator_role: the ARN of one role, without wildcard."
  }
}

variable "administrators" {
  description = "ARNs of the party's own roles or users that manage the key. They may change this policy, so they are as trusted as the party itself; they may not decrypt."
  type        = list(string)

  validation {
    condition = length(var.administrators) > 0 && alltrue([
      for arn in var.administrators : can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:(role|user)/[A-Za-z0-9+=,.@_/-]+$", arn))
    ])
    error_message = "administrators: at least one ARN of a role or user, without wildcard; not an account's root."
  }
}

variable "sealers" {
  description = "ARNs of the party's roles or users that run the client: they encrypt content keys, and read the policy before each upload."
  type        = list(string)

  validation {
    condition = length(var.sealers) > 0 && alltrue([
      for arn in var.sealers : can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:(role|user)/[A-Za-z0-9+=,.@_/-]+$", arn))
    ])
    error_message = "sealers: at least one ARN of a role or user, without wildcard; not an account's root."
  }
}

locals {
  statements = concat(
    [
      {
        Sid       = "ManageWithoutUse"
        Effect    = "Allow"
        Principal = { AWS = var.administrators }
        Action = [
          "kms:CancelKeyDeletion",
          "kms:DescribeKey",
          "kms:DisableKey",
          "kms:EnableKey",
          "kms:EnableKeyRotation",
          "kms:GetKeyPolicy",
          "kms:GetKeyRotationStatus",
          "kms:ListGrants",
          "kms:ListResourceTags",
          "kms:PutKeyPolicy",
          "kms:RevokeGrant",
          "kms:ScheduleKeyDeletion",
          "kms:TagResource",
          "kms:UntagResource",
          "kms:UpdateKeyDescription",
        ]
        Resource  = "*"
        Condition = null
      },
      {
        Sid       = "Seal"
        Effect    = "Allow"
        Principal = { AWS = var.sealers }
        Action    = ["kms:DescribeKey", "kms:Encrypt", "kms:GetKeyPolicy", "kms:ListGrants"]
        Resource  = "*"
        Condition = null
      },
    ],
    # One statement for each measurement: within a statement, registers of one image could be mixed with another's.
    [
      for index, a in var.accepted : {
        Sid       = "Enclave${index}"
        Effect    = "Allow"
        Principal = { AWS = [var.coordinator_role] }
        Action    = ["kms:Decrypt"]
        Resource  = "*"
        Condition = merge(
          {
            StringEqualsIgnoreCase = {
              "kms:RecipientAttestation:PCR0"  = lower(a.pcr0)
              "kms:RecipientAttestation:PCR1"  = lower(a.pcr1)
              "kms:RecipientAttestation:PCR2"  = lower(a.pcr2)
              "kms:RecipientAttestation:PCR16" = lower(a.pcr16)
            }
          },
          a.until == null ? {} : { DateLessThan = { "aws:CurrentTime" = a.until } },
        )
      }
    ],
  )

  # A null condition is no condition: leave the field out, as KMS wants it.
  policy = {
    Version   = "2012-10-17"
    Statement = [for s in local.statements : { for name, value in s : name => value if value != null }]
  }
}

output "json" {
  description = "The policy document."
  value       = jsonencode(local.policy)

  precondition {
    condition     = !contains(concat(var.administrators, var.sealers), var.coordinator_role)
    error_message = "coordinator_role: the coordinator must neither manage the key nor encrypt with it."
  }
}
