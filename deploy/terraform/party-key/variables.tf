variable "region" {
  description = "Region of the key; the coordinator calls KMS there."
  type        = string
}

variable "party" {
  description = "The party's name in the agreement; names the alias."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{0,62}$", var.party))
    error_message = "party: small letters, digits and hyphens."
  }
}

variable "accepted" {
  description = "Per accepted image: path of its measurements.json (`parley measure`), PCR16 of the agreement version, and until when."
  type = list(object({
    measurements = string
    pcr16        = string
    until        = optional(string)
  }))
}

variable "coordinator_role" {
  description = "ARN of the operator's role (output `role_arn` of ../operator)."
  type        = string
}

variable "administrators" {
  description = "ARNs that manage the key: the identity that runs Terraform must be among them."
  type        = list(string)
}

variable "sealers" {
  description = "ARNs that run the party's client."
  type        = list(string)
}

variable "deletion_days" {
  description = "Days between scheduling the key's deletion and losing it with all that it sealed."
  type        = number
  default     = 30

  validation {
    condition     = var.deletion_days >= 7 && var.deletion_days <= 30
    error_message = "deletion_days: KMS takes 7 to 30."
  }
}
