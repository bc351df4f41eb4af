# The parent instances. They hold no state: that is on the data volume, which survives them, or in what they share.

data "aws_ssm_parameter" "ami" {
  count = var.ami_id == null ? 1 : 0

  name = "/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-x86_64"
}

# What EC2 itself says of the type.
data "aws_ec2_instance_type" "parent" {
  instance_type = var.instance_type
}

locals {
  ami_id = var.ami_id == null ? nonsensitive(data.aws_ssm_parameter.ami[0].value) : var.ami_id
  # Left for the parent: its first core, and memory for Amazon Linux and the coordinator.
  most_cpus       = data.aws_ec2_instance_type.parent.default_vcpus - data.aws_ec2_instance_type.parent.default_threads_per_core
  most_memory_mib = data.aws_ec2_instance_type.parent.memory_size - 4096
}

module "bootstrap" {
  source   = "../modules/bootstrap"
  for_each = var.parents

  region             = var.region
  bucket             = aws_s3_bucket.this.id
  image              = { key = aws_s3_object.image.key, sha384 = var.image.sha384 }
  bundle             = { key = aws_s3_object.bundle.key, sha384 = var.bundle.sha384 }
  host_name          = var.host_name
  data_volume_id     = aws_ebs_volume.data[each.key].id
  database           = local.state.database
  blobs              = local.state.blobs
  party_roles        = var.party_roles
  enclaves           = var.enclaves
  enclave_memory_mib = var.enclave_memory_mib
  enclave_cpus       = var.enclave_cpus
}

resource "aws_launch_template" "parent" {
  for_each = var.parents

  name                   = "${var.name}-${each.key}"
  update_default_version = true
  image_id               = local.ami_id
  instance_type          = var.instance_type
  user_data              = base64gzip(module.bootstrap[each.key].user_data)
  ebs_optimized          = true

  enclave_options {
    enabled = true
  }

  # Enclaves and hibernation exclude each other.
  hibernation_options {
    configured = false
  }

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
    instance_metadata_tags      = "disabled"
  }

  iam_instance_profile {
    arn = aws_iam_instance_profile.parent.arn
  }

  network_interfaces {
    subnet_id                   = aws_subnet.public[each.value].id
    security_groups             = [aws_security_group.parent.id]
    associate_public_ip_address = true
    delete_on_termination       = true
  }

  block_device_mappings {
    device_name = "/dev/xvda"

    ebs {
      volume_size           = 30
      volume_type           = "gp3"
      encrypted             = true
      delete_on_termination = true
    }
  }

  monitoring {
    enabled = true
  }

  tag_specifications {
    resource_type = "volume"
    tags          = { Name = "${var.name}-${each.key}-root" }
  }
}

resource "aws_instance" "parent" {
  for_each = var.parents

  launch_template {
    id      = aws_launch_template.parent[each.key].id
    version = aws_launch_template.parent[each.key].latest_version
  }

  tags = { Name = "${var.name}-${each.key}" }

  depends_on = [aws_iam_role_policy.parent, aws_route_table_association.public]

  lifecycle {
    # Another Amazon Linux, image or bundle is for the next instance: this one has enclaves, and is replaced only by hand
    # (terraform apply -replace='aws_instance.parent["a"]').
    ignore_changes = [launch_template]

    precondition {
      condition     = contains(var.zones, each.value)
      error_message = "parents: ${each.key} is in ${each.value}, which is none of zones."
    }
    precondition {
      condition     = length(var.parents) == 1 || var.database != null
      error_message = "parents: several of them share their state: set database."
    }
    precondition {
      condition     = data.aws_ec2_instance_type.parent.nitro_enclaves_support == "supported"
      error_message = "instance_type: EC2 offers no enclaves on ${var.instance_type}."
    }
    precondition {
      condition     = contains(data.aws_ec2_instance_type.parent.supported_architectures, "x86_64")
      error_message = "instance_type: ${var.instance_type} is not x86_64, which the image is made for."
    }
    precondition {
      condition     = !data.aws_ec2_instance_type.parent.burstable_performance_supported && !data.aws_ec2_instance_type.parent.bare_metal
      error_message = "instance_type: ${var.instance_type} is burstable or bare metal; neither can have enclaves."
    }
    precondition {
      condition     = var.enclaves * var.enclave_cpus <= local.most_cpus && var.enclave_cpus % data.aws_ec2_instance_type.parent.default_threads_per_core == 0
      error_message = "enclave_cpus: ${var.instance_type} can give at most ${local.most_cpus} CPUs to enclaves, in whole cores."
    }
    precondition {
      condition     = var.enclaves * var.enclave_memory_mib <= local.most_memory_mib
      error_message = "enclave_memory_mib: ${var.instance_type} can give at most ${local.most_memory_mib} MiB to enclaves."
    }
  }
}

resource "aws_volume_attachment" "data" {
  for_each = var.parents

  device_name = "/dev/sdf"
  volume_id   = aws_ebs_volume.data[each.key].id
  instance_id = aws_instance.parent[each.key].id
  # The file system is unmounted before the volume goes elsewhere.
  stop_instance_before_detaching = true
}
