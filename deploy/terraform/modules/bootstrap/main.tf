# What the parent instance does at its first boot, as a value. No provider: it can be checked without an account.

terraform {
  required_version = ">= 1.5"
}

variable "region" {
  description = "Region of the bucket."
  type        = string
}

variable "bucket" {
  description = "Bucket with the artefacts."
  type        = string
}

variable "image" {
  description = "Object of the enclave image and its SHA-384."
  type        = object({ key = string, sha384 = string })
}

variable "bundle" {
  description = "Object of the coordinator's bundle and its SHA-384."
  type        = object({ key = string, sha384 = string })
}

variable "host_name" {
  description = "Name in the coordinator's certificate."
  type        = string

  validation {
    # It becomes an argument of a command.
    condition     = can(regex("^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$", var.host_name))
    error_message = "host_name: a DNS name."
  }
}

variable "data_volume_id" {
  description = "The EBS volume for /var/lib/parley."
  type        = string

  validation {
    condition     = can(regex("^vol-[0-9a-f]+$", var.data_volume_id))
    error_message = "data_volume_id: vol-…"
  }
}

variable "database" {
  description = "The coordinator's `store.database`."
  type        = string

  validation {
    condition     = can(regex("^[A-Za-z0-9._/@:?&=-]+$", var.database))
    error_message = "database: a file, or postgresql://USER@HOST/DATABASE without a password."
  }
}

variable "blobs" {
  description = "The coordinator's `store.blobs`."
  type        = string

  validation {
    condition     = can(regex("^[A-Za-z0-9._/:-]+$", var.blobs))
    error_message = "blobs: a folder, or s3://BUCKET/PREFIX."
  }
}

variable "party_roles" {
  description = "Roles that the coordinator assumes for the keys of their accounts."
  type        = list(object({ arn = string, external_id = string }))
}

variable "enclaves" {
  description = "Enclaves at a time."
  type        = number
}

variable "enclave_memory_mib" {
  description = "Memory of one enclave."
  type        = number
}

variable "enclave_cpus" {
  description = "CPUs of one enclave."
  type        = number
}

locals {
  # AWS's allocator reads this line by line: no empty line, no comment behind a value.
  allocator = join("\n", [
    "---",
    "memory_mib: ${var.enclaves * var.enclave_memory_mib}",
    "cpu_count: ${var.enclaves * var.enclave_cpus}",
    "",
  ])

  in_a_bucket = startswith(var.blobs, "s3://")

  coordinator = <<-EOT
    listen = "0.0.0.0:7443"

    [tls]
    certificate = "tls.crt"
    key = "tls.key"

    [store]
    database = "${var.database}"
    blobs = "${var.blobs}"
    %{~if local.in_a_bucket}

    [store.s3]
    region = "${var.region}"
    %{~endif}

    [launcher]
    kind = "nitro"
    enclaves = ${var.enclaves}

    [launcher.nitro]
    image = "/opt/parley/parley.eif"
    memory_mib = ${var.enclave_memory_mib}
    cpus = ${var.enclave_cpus}

    # For Prometheus on this machine; no rule lets anybody else in.
    [telemetry]
    metrics = "127.0.0.1:9464"
    %{~for role in var.party_roles}

    [kms.account.${split(":", role.arn)[4]}]
    role = "${role.arn}"
    %{~if role.external_id != ""}
    external_id = "${role.external_id}"
    %{~endif}
    %{~endfor}

    [log]
    level = "info"
  EOT

  environment = <<-EOT
    REGION=${var.region}
    BUCKET=${var.bucket}
    IMAGE_KEY=${var.image.key}
    IMAGE_SHA384=${var.image.sha384}
    BUNDLE_KEY=${var.bundle.key}
    BUNDLE_SHA384=${var.bundle.sha384}
    HOST_NAME=${var.host_name}
    DEVICE=/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_${replace(var.data_volume_id, "-", "")}
  EOT

  cloud_config = {
    package_update = true
    packages       = concat(["aws-nitro-enclaves-cli", "python3.11", "xfsprogs"], startswith(var.database, "postgresql:") ? ["postgresql16"] : [])
    write_files = [
      # Not in its place yet: the package that owns that file comes later.
      { path = "/etc/parley/allocator.yaml", permissions = "0644", content = local.allocator },
      { path = "/etc/parley/coordinator.toml", permissions = "0644", content = local.coordinator },
      { path = "/etc/parley/setup.env", permissions = "0644", content = local.environment },
      { path = "/etc/systemd/system/parley-coordinator.service", permissions = "0644", content = file("${path.module}/../../../systemd/parley-coordinator.service") },
      { path = "/usr/lib/sysusers.d/parley.conf", permissions = "0644", content = file("${path.module}/../../../systemd/parley.sysusers") },
      { path = "/etc/systemd/system/parley-backup.service", permissions = "0644", content = file("${path.module}/../../../systemd/parley-backup.service") },
      { path = "/etc/systemd/system/parley-backup.timer", permissions = "0644", content = file("${path.module}/../../../systemd/parley-backup.timer") },
      { path = "/usr/local/sbin/parley-backup", permissions = "0755", content = file("${path.module}/../../../systemd/parley-backup") },
      { path = "/usr/local/sbin/parley-setup", permissions = "0755", content = file("${path.module}/setup.sh") },
    ]
    runcmd = [["/usr/local/sbin/parley-setup"]]
  }
}

output "user_data" {
  description = "cloud-init's file."
  value       = "#cloud-config\n${yamlencode(local.cloud_config)}"
}
