variable "region" {
  description = "Region of everything."
  type        = string
}

variable "name" {
  description = "Prefix of names; role, bucket and logs carry it."
  type        = string
  default     = "parley"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}$", var.name))
    error_message = "name: 2 to 31 small letters, digits and hyphens."
  }
}

variable "host_name" {
  description = "Name at which members reach the coordinators; stands in their TLS certificate."
  type        = string
}

variable "zones" {
  description = "Availability zones of the network, in an order that stays: new ones go to the end. A database needs two."
  type        = list(string)

  validation {
    condition     = length(var.zones) >= 1 && length(var.zones) <= 8 && length(distinct(var.zones)) == length(var.zones)
    error_message = "zones: 1 to 8, each once."
  }
}

variable "parents" {
  description = "The parent instances, each with its zone, which its data volume cannot leave. More than one needs `database`."
  type        = map(string)

  validation {
    condition     = length(var.parents) >= 1 && alltrue([for name, zone in var.parents : can(regex("^[a-z][a-z0-9-]{0,15}$", name))])
    error_message = "parents: at least one; names of 1 to 16 small letters, digits and hyphens."
  }
}

variable "database" {
  description = "PostgreSQL for the state, with a copy in a second zone, and the bucket for tables and bundles. Null: a file and a folder on the data volume, for one parent."
  type = object({
    instance_class = string
    storage_gib    = number
  })
  default = null

  validation {
    condition     = var.database == null ? true : can(regex("^db\\.[a-z0-9]+\\.[a-z0-9]+$", var.database.instance_class)) && var.database.storage_gib >= 20 && floor(var.database.storage_gib) == var.database.storage_gib
    error_message = "database: instance_class db.…, storage_gib at least 20."
  }
}

variable "vpc_cidr" {
  description = "Addresses of the network."
  type        = string
  default     = "10.70.0.0/24"

  validation {
    condition     = can(cidrsubnet(var.vpc_cidr, 4, 0))
    error_message = "vpc_cidr: an IPv4 network of at least a /24, such as 10.70.0.0/24."
  }
}

variable "members_cidrs" {
  description = "Networks of the members: only they reach the coordinator's port."
  type        = list(string)

  validation {
    condition     = length(var.members_cidrs) > 0 && alltrue([for c in var.members_cidrs : can(cidrhost(c, 0)) && !can(regex("/[0-7]$", c))])
    error_message = "members_cidrs: at least one IPv4 network, none wider than a /8: the port is not for everybody."
  }
}

variable "instance_type" {
  description = "Parent instance: Nitro-based x86_64 with at least 4 CPUs; not burstable, not bare metal."
  type        = string
  default     = "m6i.xlarge"

  validation {
    # What is not plain from the name (does EC2 offer enclaves on it?) EC2 is asked for: instance.tf.
    condition = (
      can(regex("^[a-z0-9-]+\\.([0-9]*x)large$", var.instance_type))
      && !can(regex("^t[0-9]", var.instance_type))
      && !can(regex("^[a-z]+[0-9]+g", var.instance_type))
    )
    error_message = "instance_type: xlarge or larger, x86_64 (no Graviton), not burstable (t*), not metal."
  }
}

variable "ami_id" {
  description = "Amazon Linux 2023, x86_64. Null takes the newest whenever the instance is made; the running one stays as it is."
  type        = string
  default     = null
}

variable "enclaves" {
  description = "Enclaves at a time (`python -m parley_deploy.allocator`)."
  type        = number
  default     = 1

  validation {
    condition     = var.enclaves >= 1 && var.enclaves <= 4 && floor(var.enclaves) == var.enclaves
    error_message = "enclaves: 1 to 4."
  }
}

variable "enclave_memory_mib" {
  description = "Memory of one enclave, from the allocator command: at least 4 times the image."
  type        = number

  validation {
    condition     = var.enclave_memory_mib >= 64 && var.enclave_memory_mib % 2 == 0
    error_message = "enclave_memory_mib: whole pages of 2 MiB, at least 64."
  }
}

variable "enclave_cpus" {
  description = "CPUs of one enclave: whole cores."
  type        = number
  default     = 2

  validation {
    condition     = var.enclave_cpus >= 1 && var.enclave_cpus <= 64 && floor(var.enclave_cpus) == var.enclave_cpus
    error_message = "enclave_cpus: 1 to 64."
  }
}

variable "image" {
  description = "The enclave image: path of the EIF on this machine and its SHA-384."
  type = object({
    path   = string
    sha384 = string
  })

  validation {
    condition     = can(regex("^[0-9a-f]{96}$", var.image.sha384))
    error_message = "image: sha384 has 96 small hex digits (sha384sum prints them)."
  }
}

variable "bundle" {
  description = "The coordinator with all it needs: path of coordinator.tar on this machine and its SHA-384."
  type = object({
    path   = string
    sha384 = string
  })

  validation {
    condition     = can(regex("^[0-9a-f]{96}$", var.bundle.sha384))
    error_message = "bundle: sha384 has 96 small hex digits (sha384sum prints them)."
  }
}

variable "data_gib" {
  description = "Volume of each parent: database, ciphertext, bundles; with `database`, little."
  type        = number
  default     = 200

  validation {
    condition     = var.data_gib >= 10 && floor(var.data_gib) == var.data_gib
    error_message = "data_gib: at least 10."
  }
}

variable "backup_days" {
  description = "How long hourly copies of the database stay in the bucket, and with `database` what any moment is restored from (35 at most)."
  type        = number
  default     = 14

  validation {
    condition     = var.backup_days >= 1 && floor(var.backup_days) == var.backup_days
    error_message = "backup_days: at least 1."
  }
}

variable "party_keys" {
  description = "ARNs of the parties' KMS keys (output `key_arn` of ../party-key) under which the coordinator may ask for decryption to an enclave."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for arn in var.party_keys : can(regex("^arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]{12}:key/[A-Za-z0-9-]+$", arn))])
    error_message = "party_keys: ARNs of keys, without wildcard."
  }
}

variable "party_roles" {
  description = "Roles in the parties' accounts that the coordinator assumes for their keys, with the external ID (or \"\") that each wants; instead of `party_keys`."
  type        = list(object({ arn = string, external_id = string }))
  default     = []

  validation {
    condition     = alltrue([for role in var.party_roles : can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:role/[A-Za-z0-9+=,.@_/-]+$", role.arn))])
    error_message = "party_roles: ARNs of roles, without wildcard."
  }
  validation {
    condition     = length(distinct([for role in var.party_roles : split(":", role.arn)[4]])) == length(var.party_roles)
    error_message = "party_roles: one for each account."
  }
  validation {
    condition     = alltrue([for role in var.party_roles : can(regex("^[A-Za-z0-9+=,.@:/-]*$", role.external_id))])
    error_message = "party_roles: an external ID has letters, digits and +=,.@:/-"
  }
}
