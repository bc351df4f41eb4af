# A party's key, in the party's own account. Only an enclave with the accepted image and agreement can have anything decrypted under it.

locals {
  registers = [for a in var.accepted : jsondecode(file(a.measurements)).Measurements]
}

module "policy" {
  source = "../modules/key-policy"

  accepted = [
    for index, a in var.accepted : {
      pcr0  = local.registers[index].PCR0
      pcr1  = local.registers[index].PCR1
      pcr2  = local.registers[index].PCR2
      pcr16 = a.pcr16
      until = a.until
    }
  ]
  coordinator_role = var.coordinator_role
  administrators   = var.administrators
  sealers          = var.sealers
}

resource "aws_kms_key" "party" {
  description             = "Parley: content keys of ${var.party}, for attested enclaves only"
  policy                  = module.policy.json
  enable_key_rotation     = true
  multi_region            = false
  deletion_window_in_days = var.deletion_days
  # KMS itself refuses a policy under which nobody could change it any more.
  bypass_policy_lockout_safety_check = false

  lifecycle {
    prevent_destroy = true
  }
}
